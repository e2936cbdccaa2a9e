"""Rates, ratios and limits of the engine benchmark, and the report that is made of them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench import charts, engines, figures, report
from tests.bench.figures import Kind, Row, Task
from tests.bench.peers.registry import ENGINES, FORMS, OURS, PRECISIONS
from tests.bench.peers.shapes import SHAPES, Shape
from tests.bench.rows import RowFile, Run

DECODE = Task(kind=Kind.DECODE, batch=8, prompt=128, tokens=128)
PREFILL = Task(kind=Kind.PREFILL, batch=1, prompt=1024)
SMALL = Shape("llama", 100, 16, 32, 2, 4, 2, 64, 1e-5, 1e4)


def row(engine: str = OURS, task: Task = DECODE, **changes: object) -> Row:
    known = Row(
        model="smollm2-135m",
        precision="bf16",
        engine=engine,
        run="now",
        round=1,
        task=task,
        first_seconds=0.5,
        seconds=3.04,
        bandwidth=40.0,
        near_bandwidth=50.0,
        foreign=0.02,
    )
    return dataclasses.replace(known, **changes)  # type: ignore[arg-type]


# --- one measurement


def test_the_first_token_is_taken_off_decode() -> None:
    assert row().step_seconds == pytest.approx(2.54 / 127)
    assert row().rate == pytest.approx(8 * 127 / 2.54)


def test_prefill_counts_the_prompt() -> None:
    assert row(task=PREFILL).rate == pytest.approx(1024 / 0.5)


# --- rounds


def test_ratios_are_taken_within_a_round_against_the_fastest_of_it() -> None:
    rows = [
        *(row(first_seconds=0.0, seconds=127.0 * each, round=number) for number, each in ((1, 1.0), (2, 4.0))),
        *(row("fast", first_seconds=0.0, seconds=127.0 * each, round=number) for number, each in ((1, 2.0), (2, 2.0))),
        *(row("slow", first_seconds=0.0, seconds=127.0 * each, round=number) for number, each in ((1, 9.0), (2, 1.0))),
    ]
    assert figures.ratios(rows, OURS, ["fast"]) == pytest.approx([2.0, 0.5])
    assert figures.ratios(rows, OURS, ["fast", "slow"]) == pytest.approx([2.0, 0.25])


def test_equal_numbers_of_other_runs_are_other_rounds() -> None:
    assert figures.ratios([row(run="one"), row("other", run="two")], OURS, ["other"]) == []


def test_a_disturbed_side_leaves_no_ratio() -> None:
    assert figures.ratios([row(foreign=0.2), row("other")], OURS, ["other"]) == []
    assert figures.ratios([row(), row("other", foreign=0.2)], OURS, ["other"]) == []


def test_disturbed_rows_count_only_where_there_is_no_other() -> None:
    quiet, disturbed = row(), row(foreign=0.5)
    assert figures.quiet_or_all([disturbed, quiet]) == [quiet]
    assert figures.quiet_or_all([disturbed]) == [disturbed]


# --- the roofline


def test_parameters_are_those_of_the_model() -> None:
    """What SmolLM2-135M and Qwen2.5-0.5B are published with, less norms and biases."""
    parameters = {name: shape.layer_parameters + shape.embedding_parameters for name, shape in SHAPES.items()}
    assert parameters["smollm2-135m"] == 134_515_008 - 61 * 576
    assert parameters["qwen2.5-0.5b"] == 494_032_768 - 49 * 896 - 24 * (896 + 2 * 128)


def test_a_step_of_decode_reads_all_weights_once_and_the_mean_context_of_each_sequence() -> None:
    task = Task(kind=Kind.DECODE, batch=3, prompt=10, tokens=4)
    layers = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32)
    keys_and_values = 3 * 12 * 2 * 2 * 8
    assert figures.step_bytes(SMALL, "fp32", task) == 4 * (layers + 100 * 16 + keys_and_values)
    assert figures.step_bytes(SMALL, "bf16", task) == 2 * (layers + 100 * 16 + keys_and_values)
    attention = 2 * 4 * 12 * 2 * 4 * 4  # queries by keys, and weights by values, in each layer
    assert figures.step_operations(SMALL, task) == 3 * (2 * (layers + 100 * 16) + attention / 2)


def test_the_limit_is_memory_or_arithmetic_whichever_takes_longer() -> None:
    shape = SHAPES["smollm2-135m"]
    memory = figures.step_bytes(shape, "bf16", DECODE) / 40e9
    assert figures.limit_seconds(shape, row(), 40.0, {}) == pytest.approx(memory)
    assert figures.limit_seconds(shape, row(), 40.0, {"bf16": 1e6}) == pytest.approx(memory)
    assert figures.limit_seconds(shape, row(), 40.0, {"bf16": 1.0}) == pytest.approx(
        figures.step_operations(shape, DECODE) / 1e9
    )


def test_shares_are_of_the_limit_by_each_bandwidth() -> None:
    shape = SHAPES["smollm2-135m"]
    far, near = figures.shares(shape, [row(), row()], {})
    assert far == pytest.approx(figures.step_bytes(shape, "bf16", DECODE) / 40e9 / row().step_seconds)
    assert near == pytest.approx(far * 40 / 50)


# --- the registry


def test_every_engine_loads_forms_that_can_be_made() -> None:
    for engine in ENGINES.values():
        assert set(engine.forms) <= set(PRECISIONS)
        assert set(engine.forms.values()) <= set(FORMS)
        assert (Path(report.__file__).parent / "peers" / f"{engine.module}.py").is_file()


# --- what is measured


def test_others_are_asked_for_all_that_is_compared_whatever_this_engine_does_besides() -> None:
    common = engines.tasks([1, 8])
    special = engines.context_tasks(common)
    assert not set(common) & set(special)
    lengths = {kind: {task.prompt for task in (*common, *special) if task.kind is kind} for kind in Kind}
    assert lengths[Kind.DECODE] == lengths[Kind.PREFILL] == set(engines.CONTEXTS)


# --- the report


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "some" / "rows.jsonl")
    assert file.rows() == []
    rows = [row(), row("other", PREFILL)]
    run = Run(run="now", machine="one", threads=2, peak={"bf16": 2000.0})
    for entry in (run, rows[0], run.with_versions({OURS: "1"}), rows[1], run.with_versions({"other": "2"})):
        file.add(entry)
    assert file.rows() == rows
    assert file.runs() == {"now": run.with_versions({OURS: "1", "other": "2"})}


def test_the_report_is_made_of_the_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    file.add(Run(run="now", machine="two cores", threads=2, peak={"bf16": 2000.0}))
    for task in (DECODE, dataclasses.replace(DECODE, batch=1), PREFILL):
        for engine, seconds in ((OURS, 3.04), ("openvino", 5.58), ("llama.cpp", 4.31)):
            file.add(row(engine, task, seconds=seconds, foreign=0.4 if engine == "llama.cpp" else 0.0))
    for length in (128, 256):
        file.add(row(task=Task(kind=Kind.DECODE, batch=1, prompt=length, tokens=33)))
        file.add(row(task=Task(kind=Kind.PREFILL, batch=1, prompt=length)))
    report.make(file, argparse.Namespace(model="smollm2-135m", precisions=["bf16", "int8"], folder=tmp_path))
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    assert "two cores" in printed
    assert "| openvino | " in (tmp_path / "engines-smollm2-135m.md").read_text()
    assert lines["the"] == ["the", "best", "of", "each", "round", "2.00", "2.00", "1.00"]
    assert lines["with"] == ["with", "KV", "cache", "79.4", "79.4"]
    assert lines["everything"] == ["everything", "computed", "again", "500.0", "500.0"]
    assert "* (" in next(line for line in printed.splitlines() if line.startswith("llama.cpp"))
    picture = ElementTree.parse(tmp_path / "engines-smollm2-135m.svg")
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {OURS, "openvino", "with KV cache", "everything computed again"} <= set(texts)


def test_a_panel_has_a_line_per_series_with_all_its_points() -> None:
    panel = charts.Panel("some", {"one": [(1, 10.0), (8, 80.0)], "two": [(8, 8.0)]})
    picture = ElementTree.fromstring(charts.draw([panel], emphasized="one"))
    lines = picture.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 1]
