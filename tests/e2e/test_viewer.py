"""Spans that a process sends are whole in a viewer that is not ours. `make viewer` says where it is kept."""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from fermata import Client
from services.common.telemetry import Telemetry, TelemetrySettings
from services.common.tracing import Span, SpanKind, new_trace, step_context
from tests.e2e.otlp_receiver import Viewer, is_supported, running
from tests.e2e.system import UpSystem, wait_for

FOLDER = os.environ.get("FERMATA_TEST_VIEWER", "")
GENERATION = "a" * 26 + "." + "0" * 16

pytestmark = [
    pytest.mark.skipif(not FOLDER, reason="FERMATA_TEST_VIEWER names no folder to install a viewer in"),
    pytest.mark.skipif(not is_supported(), reason="the viewer is not made for this machine"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def viewer() -> Iterator[Viewer]:
    with running(Path(FOLDER).absolute()) as started:
        yield started


def test_a_trace_of_two_processes_comes_back_whole(viewer: Viewer) -> None:
    settings = TelemetrySettings(otlp_endpoint=viewer.endpoint)
    tokenizer, shard = Telemetry("tokenizer", settings), Telemetry("shard", settings)
    began = 10**9 * int(time.time())
    root, step = new_trace(sampled=True), step_context("71", 4)
    departed = array("i", range(0, 30 * 1024, 30))
    decode = Span(
        "decode",
        root.child("decode"),
        root.span_id,
        began + 1_000,
        began + 31_000_000,
        attributes={"fermata.token.departed_us": departed, "fermata.shards": ["71", "72"], "fermata.choice": 0},
    )
    sent = {
        "chat": Span("chat tiny", root, b"", began, began + 40_000_000, SpanKind.SERVER, error="the shard is gone"),
        "decode": decode,
        "token": Span("token", root.child(), decode.context.span_id, began + 1_000, began + 2_000, links=[step]),
    }
    sequence = Span("sequence", root.child(), root.span_id, began + 500, began + 30_000_000)
    for span in sent.values():
        tokenizer.record(GENERATION, span)
    shard.record(GENERATION, sequence)
    shard.export(Span("step", step, b"", began + 1_000, began + 2_000, attributes={"fermata.step.number": 4}))
    tokenizer.close()
    shard.close()
    while len(received := {item.span["name"]: item for item in viewer.spans(root.trace_id)}) < 4:
        time.sleep(0.1)
    for span in (*sent.values(), sequence):
        item = received[span.name].span
        assert (item["traceId"], item["spanId"]) == (root.trace_id.hex(), span.context.span_id.hex())
        assert (item.get("parentSpanId", ""), item["kind"]) == (span.parent_id.hex(), span.kind)
        assert (int(item["startTimeUnixNano"]), int(item["endTimeUnixNano"])) == (span.start_ns, span.end_ns)
    assert received["chat tiny"].process["service.name"] == "fermata-tokenizer"
    assert received["sequence"].process["service.name"] == "fermata-shard"
    assert json.loads(received["decode"].attributes["fermata.token.departed_us"]) == list(departed)
    assert json.loads(received["decode"].attributes["fermata.shards"]) == ["71", "72"]
    assert received["decode"].attributes["fermata.choice"] == "0"
    assert received["chat tiny"].span["status"] == {"code": 2, "message": "the shard is gone"}
    [link] = received["token"].span["links"]
    assert (link["traceId"], link["spanId"]) == (step.trace_id.hex(), step.span_id.hex())
    [linked] = viewer.spans(step.trace_id)
    assert (linked.span["name"], linked.attributes["fermata.step.number"]) == ("step", "4")


def test_the_trace_of_one_request_through_the_whole_system_comes_back_whole(viewer: Viewer, tmp_path: Path) -> None:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": viewer.endpoint, "FERMATA_WATERFALL_SHARE": "1"}
    with UpSystem(tmp_path / "state", environment=environment) as system, Client(system.address) as reader:
        answer = reader.generate(token_ids=[20, 30, 40], ignore_eos=True, max_tokens=30)
        remembered = json.loads(reader.trace(answer.generation_id))
        spans = [
            span
            for entry in remembered["resourceSpans"]
            for scope in entry["scopeSpans"]
            for span in scope["spans"]
            if span["name"] != "step"
        ]
        (trace_id,) = {span["traceId"] for span in spans}

        def whole() -> bool:
            names = [item.span["name"] for item in viewer.spans(bytes.fromhex(trace_id))]
            return names.count("token") == 30 and "sequence" in names and "own" in names

        wait_for(whole, 30, "all spans in the viewer")
        received = {item.span["spanId"]: item for item in viewer.spans(bytes.fromhex(trace_id))}
    assert {span["spanId"] for span in spans} <= received.keys()
    assert {item.process["service.name"] for item in received.values()} == {
        "fermata-tokenizer",
        "fermata-orchestrator",
        "fermata-shard",
    }
    roots = [item.span["name"] for item in received.values() if item.span.get("parentSpanId", "") not in received]
    assert roots == ["fermata.v1.GenerationService/StreamGenerate"]
    (decode,) = [item for item in received.values() if item.span["name"] == "decode"]
    assert len(json.loads(decode.attributes["fermata.token.departed_us"])) == 30
    linked = [link["traceId"] for item in received.values() for link in item.span.get("links", ())]
    assert [item.span["name"] for item in viewer.spans(bytes.fromhex(linked[0]))] == ["step"]
