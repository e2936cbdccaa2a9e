"""The page of a trace: it needs nothing else, nothing in it can be more than text, and its data is what is drawn."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import pytest

from fermata.blame import outliers
from fermata.parts import PARTS
from fermata.trace import Trace, read_trace
from fermata.trace_page import MOST_SLOW, trace_page
from tests.unit.clients.trace_document import GENERATION, OTHERS, SHARDS, Plan, Slow, trace_document

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what is in them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.said = ""
        self.scripts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.said += data

    @property
    def data(self) -> Any:
        """What the script draws."""
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(trace_document())


@pytest.fixture(scope="module")
def page(trace: Trace) -> Page:
    return Page(trace_page(trace))


@pytest.mark.parametrize(
    "plan",
    [Plan(), Plan(tokens=0, error="gone"), Plan(tokens=1), Plan(choices=3, tokens=70), Plan(resumed_at=50, tokens=80)],
    ids=["usual", "nothing", "one token", "choices", "resumed"],
)
def test_it_is_well_formed_and_needs_nothing_else(plan: Plan) -> None:
    text = trace_page(read_trace(trace_document(plan)))
    page = Page(text)
    assert page.open == []
    assert not {"img", "link", "iframe", "object", "embed", "base"} & set(page.names)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))


def test_what_it_says(page: Page, trace: Trace) -> None:
    said = " ".join(page.said.split())
    for text in (GENERATION, "chat · tiny · 700 prompt tokens · 64 of them from the KV cache · ended by stop"):
        assert text in said
    for fact in ("2.34 s", "32.0 ms", "9.6 ms", "5.6 ms", "155.1 ms"):
        assert fact in said
    assert "Mostly forward: step 1178 computed 188 tokens of its own prompt." in said
    for verdict in outliers(trace):
        assert f"token {verdict.token.offset}" in said
        assert verdict.reason in said
        assert f"step {verdict.token.step}" in said
    assert f"{OTHERS[1]}512 tokens" in page.said
    for part in PARTS.values():
        assert part.title in said


def test_data(page: Page, trace: Trace) -> None:
    (choice,) = page.data["choices"]
    tokens = trace.choices[0]
    assert choice["offsets"] == list(range(240))
    assert choice["intervals"] == [token.interval for token in tokens]
    assert choice["steps"][57] == tokens[57].step
    assert (choice["shards"][0], choice["shards"][-1]) == SHARDS
    names = [part["name"] for part in page.data["parts"]]
    assert names == [part for part in PARTS if part in names]
    assert set(choice["parts"]) == set(names)
    for index in (0, 57, 200):
        assert sum(column[index] for column in choice["parts"].values()) == tokens[index].interval
    mates = page.data["steps"][f"{SHARDS[0]} {tokens[57].step}"]
    assert [(page.data["names"][name], length) for name, length in mates] == [(OTHERS[1], 512), (OTHERS[0], 1)]
    assert set(choice["verdicts"]) == {"0", *(str(verdict.token.offset) for verdict in outliers(trace))}


def test_the_chart_is_high_enough_for_what_is_usual_and_cuts_the_rest(page: Page) -> None:
    (choice,) = page.data["choices"]
    assert choice["highest"] > 500_000
    assert choice["slow"] < choice["top"] < 50_000
    assert 0 < choice["bottom"] <= 0.3 * choice["top"]
    (even,) = Page(trace_page(read_trace(trace_document(Plan(planted={}, tokens=50))))).data["choices"]
    assert even["top"] <= even["highest"] < 40_000


def test_a_name_can_only_be_text() -> None:
    name = "</script><img src=x onerror=alert(1)>\"'&<!--"
    plan = Plan(generation_id=name, tokens=60, error=name)
    page = Page(trace_page(read_trace(trace_document(plan))))
    assert page.open == []
    assert "img" not in page.names
    assert len(page.scripts) == 2
    assert page.said.count(name) >= 3
    mate = Plan(tokens=60, planted={30: Slow("forward", 90_000, prompt=8)})
    document = trace_document(mate).replace(OTHERS[1].encode(), json.dumps(name)[1:-1].encode())
    page = Page(trace_page(read_trace(document)))
    assert "img" not in page.names
    assert name in page.data["names"]
    assert f"also computed 8 prompt tokens of {name}" in page.data["choices"][0]["verdicts"]["30"]
    assert name in page.said


def test_choices_can_be_chosen() -> None:
    page = Page(trace_page(read_trace(trace_document(Plan(choices=3, tokens=70)))))
    assert [value for name, value in page.attributes if name == "data-choice"] == ["0", "1", "2"]
    assert [choice["choice"] for choice in page.data["choices"]] == [0, 1, 2]
    assert ("data-token", "2 57") in page.attributes
    assert "token 57, choice 2" in page.said


def test_the_slowest_are_explained_when_there_are_many() -> None:
    planted = {offset: Slow("forward", 20_000 + offset) for offset in range(10, 10 + MOST_SLOW + 20)}
    page = Page(trace_page(read_trace(trace_document(Plan(planted=planted, tokens=400)))))
    assert [name for name, _ in page.attributes].count("data-token") == MOST_SLOW
    assert f"the slowest {MOST_SLOW} of {MOST_SLOW + 20}" in page.said


def test_a_generation_without_tokens() -> None:
    page = Page(trace_page(read_trace(trace_document(Plan(tokens=0, error="the store is gone")))))
    assert "It failed: the store is gone" in page.said
    assert "canvas" not in page.names
    assert page.data["choices"] == []


def test_every_part_has_a_colour_on_light_and_on_dark_ground(trace: Trace) -> None:
    style = trace_page(trace).partition("</style>")[0]
    for part in PARTS:
        assert len(re.findall(rf"--part-{part}: #[0-9a-f]{{6}};", style)) == 2
    used = set(re.findall(r"var\((--[\w-]+)\)", trace_page(trace)))
    assert used <= set(re.findall(r"(--[\w-]+):", trace_page(trace)))


def test_the_script_finds_what_it_looks_for(page: Page) -> None:
    script = resources.files("fermata").joinpath("trace_page.js").read_text(encoding="utf-8")
    wanted = re.findall(r'getElementById\("([\w-]+)"\)', script)
    assert {"data", "overview", "tip", "whole"} == set(wanted)
    assert set(wanted) <= {value for name, value in page.attributes if name == "id"}
    classes = {word for name, value in page.attributes if name == "class" for word in value.split()}
    assert set(re.findall(r'querySelector\("\.([\w-]+)"\)', script)) <= classes
