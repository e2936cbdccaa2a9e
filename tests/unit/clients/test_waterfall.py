"""The picture of a trace as text: it fits, and it says what a reader wants to know."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fermata.blame import outliers
from fermata.parts import PARTS
from fermata.printing import RED, display_width
from fermata.trace import Trace, read_trace
from fermata.waterfall import MOST_MATES, MOST_SLOW, activity_rows, waterfall
from tests.unit.clients.trace_document import FIRST, GENERATION, OTHERS, Plan, Slow, trace_document

PLANS = {
    "usual": Plan(),
    "choices": Plan(choices=3, tokens=70),
    "failed": Plan(
        tokens=0, error="the session store cannot be reached, and nobody knows for how long this will be so"
    ),
    "one token": Plan(tokens=1),
    "long": Plan(tokens=2500, forgotten=2400),
    "long name": Plan(generation_id="g" * 200, tokens=30),
}


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(trace_document())


def text(trace: Trace, width: int = 80) -> str:
    return "\n".join(line.text for line in waterfall(trace, width))


@pytest.mark.parametrize("width", [60, 80, 133])
@pytest.mark.parametrize("name", PLANS)
def test_it_fits(name: str, width: int) -> None:
    lines = [line.text for line in waterfall(read_trace(trace_document(PLANS[name])), width)]
    assert lines[0].startswith("generation ")
    assert max(map(display_width, lines)) <= width
    assert not any("\n" in line for line in lines)


def test_header(trace: Trace) -> None:
    lines = text(trace, 120).splitlines()
    assert lines[0] == f"generation {GENERATION}"
    assert lines[1:4] == [
        "chat tiny · 700 prompt tokens, 64 cached · ended by stop · 240 tokens in 2.34 s · first token after 32.0 ms",
        "then 9.6 ms per token · p50 5.6 ms, p99 155.1 ms · 8 slow tokens",
        "",
    ]


def test_what_was_done(trace: Trace) -> None:
    lines = text(trace).splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("the request"))
    rows = lines[begin + 1 : lines.index("", begin)]
    assert [row.split()[0] for row in rows] == [
        *("call", "render", "encode", "open", "claim", "place", "own", "admission"),
        *("waiting", "prefill", "decode", "takeover", "own", "admission"),
    ]
    bars = {row.split()[0]: (row.index(row.split()[2][0], 20), row.split()[2]) for row in rows}
    assert bars["call"] == (30, "█" * 39)
    assert bars["place"] == (30, "▏"), "what is short can still be seen"
    assert bars["takeover"][0] > 55
    assert [row.split()[-2:] for row in rows[:3]] == [["2.34", "s"], ["340", "µs"], ["520", "µs"]]
    failed = [line.text for line in waterfall(trace) if line.style == RED]
    assert len(failed) == 1
    assert failed[0].startswith("admission")


def test_first_token(trace: Trace) -> None:
    said = text(trace)
    assert "first token: 32.0 ms\n" in said
    for part in FIRST:
        assert f"\n{PARTS[part].title:<13}" in said
        assert PARTS[part].description in said
    assert "forward         11.3 ms   35.3 %  ██▌     forward pass of the step" in said
    assert "mostly forward: step 1178 computed 188 tokens of its own prompt" in said


def test_between_tokens(trace: Trace) -> None:
    lines = text(trace).splitlines()
    begin = lines.index("between tokens     mean       p50       p99    share")
    shares = {row.split()[0]: row for row in lines[begin + 1 : lines.index("", begin)]}
    assert shares["forward"] == "forward          6.8 ms    5.2 ms    5.9 ms   70.0 %  ██████████████████▎"
    assert "open" not in shares
    course = lines[lines.index("tokens 1 to 239, each column up to 33.5 ms and more") + 1]
    assert len(course) == 80
    assert set(course) == set("▁▂█"), "what is slow stands out, and what catches up behind it is below the rest"


def test_without_slow_tokens_the_columns_have_the_height_of_the_highest() -> None:
    said = text(read_trace(trace_document(Plan(planted={}, tokens=40))))
    assert "tokens 1 to 39, each column up to 6." in said
    assert "and more" not in said
    assert "slow" not in said


def test_slowest_tokens(trace: Trace) -> None:
    said = " ".join(text(trace).split())
    assert "the slowest of 8 slow tokens" in said
    verdicts = outliers(trace)
    for verdict in verdicts[:MOST_SLOW]:
        assert verdict.sentence() in said
    for verdict in verdicts[MOST_SLOW:]:
        assert verdict.sentence() not in said
    assert f"step 1235 with {OTHERS[1]} 512, {OTHERS[0]} 1" in said
    bars = [line.strip() for line in text(trace).splitlines() if line.startswith("  ") and set(line) <= set(" WFCI?")]
    assert bars == ["?" * 78, "F" * 58, "F" + "I" * 23, "W" * 9 + "F", "F" + "C" * 7]
    assert said.endswith("W wait, F forward, C commit, I write, ? unaccounted")


def test_one_slow_token_alone_in_its_step() -> None:
    trace = read_trace(trace_document(Plan(planted={10: Slow("forward", 70_000)}, tokens=15)))
    assert "the slow token\ntoken 10: " in text(trace)
    assert "  step 1188 with nobody\n" in text(trace)


def test_many_batch_mates(trace: Trace) -> None:
    step = trace.step_of(trace.choices[0][57])
    assert step is not None
    crowd = replace(step, batch=tuple((f"g{index}", 1) for index in range(MOST_MATES + 3)))
    said = text(replace(trace, steps={**trace.steps, (step.shard, step.number): crowd}))
    assert "step 1235 with g0 1, g1 1, g2 1, g3 1, g4 1, g5 1, 3 more" in said


def test_several_choices_are_told_apart() -> None:
    trace = read_trace(trace_document(Plan(choices=2, tokens=60)))
    labels = [label for label, _ in activity_rows(trace)]
    assert labels[7:] == [
        *("admission 0", "waiting 0", "prefill 0", "decode 0", "admission 1", "waiting 1", "prefill 1", "decode 1"),
    ]
    said = text(trace)
    assert "first token of choice 0: 32.0 ms\nopen" in said
    assert "first token of choice 1: 32.0 ms\nmostly forward: " in said
    assert "tokens 1 to 59 of choice 1, " in said
    assert "token 57 of choice 1: " in said


def test_a_failure_is_told() -> None:
    lines = waterfall(read_trace(trace_document(PLANS["failed"])))
    assert [line.text for line in lines if line.style == RED][:2] == [
        "it failed: the session store cannot be reached, and nobody knows for how long",
        "  this will be so",
    ]
    assert not any(line.text.startswith(("first token", "between")) for line in lines)
