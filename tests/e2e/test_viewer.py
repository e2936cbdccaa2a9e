"""Spans that a process sends are whole in a viewer that is not ours. `make viewer-test` says where it is kept."""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.telemetry import Telemetry, TelemetrySettings
from services.common.tracing import Span, SpanKind, new_trace, step_context
from tests.e2e.otlp_receiver import Viewer, is_supported, running

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
