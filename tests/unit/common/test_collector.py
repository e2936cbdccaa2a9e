"""Spans and figures arrive at a collector, or are counted as dropped; a bad collector disturbs nobody."""

from __future__ import annotations

import logging
import socket
import threading
import time
from array import array
from collections.abc import Callable

import grpc
import pytest

from services.common import collector as module
from services.common.collector import Collector
from services.common.metrics import Metrics, Name
from services.common.otlp import resource
from services.common.tracing import Span, SpanKind, TraceContext, new_trace, step_context
from tests.unit.common.otlp_receiver import receiving

PROCESS = resource("tokenizer", instance_id="c0ffee", node="here")


def token(root: TraceContext, number: int = 0) -> Span:
    return Span("token", root.child(number), root.span_id, 10**18, 10**18 + number, attributes={"number": number})


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread does; the test's own limit ends a wait that is in vain."""
    while not condition():
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another test made the log say does not silence this one."""
    monkeypatch.setattr(module._quiet, "_quiet_until", 0.0)


@pytest.fixture
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.2)


@pytest.fixture
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUED_SPANS", 8)
    monkeypatch.setattr(module, "BATCH_SPANS", 4)


def test_a_span_arrives_as_it_is() -> None:
    root = new_trace(sampled=True)
    step = step_context("71", 4)
    span = Span(
        "decode",
        root.child("decode"),
        root.span_id,
        1_700_000_000_123_456_789,
        1_700_000_000_987_654_321,
        SpanKind.CLIENT,
        {"text": "one", "number": -5, "share": 0.5, "yes": True, "names": ["a", "b"], "times": array("i", [1, -2, 3])},
        [step],
        "the shard is gone",
    )
    with receiving() as receiver:
        collector = Collector(receiver.endpoint, PROCESS, list)
        collector.offer(span)
        collector.close()
    [process] = receiver.resource_spans
    assert {item.key: item.value.string_value or item.value.int_value for item in process.resource.attributes} == {
        **PROCESS
    }
    [got] = receiver.spans
    assert (got.trace_id, got.span_id, got.parent_span_id) == (root.trace_id, span.context.span_id, root.span_id)
    assert (got.name, got.start_time_unix_nano, got.end_time_unix_nano) == ("decode", span.start_ns, span.end_ns)
    assert int(got.kind) == SpanKind.CLIENT
    assert [(link.trace_id, link.span_id) for link in got.links] == [(step.trace_id, step.span_id)]
    assert (got.status.code, got.status.message) == (2, "the shard is gone")
    values = {item.key: item.value for item in got.attributes}
    assert (values["text"].string_value, values["number"].int_value, values["share"].double_value) == ("one", -5, 0.5)
    assert values["yes"].bool_value
    assert [value.string_value for value in values["names"].array_value.values] == ["a", "b"]
    assert values["times"].string_value == "[1, -2, 3]"
    assert (collector.exported, collector.dropped) == (1, 0)


def test_figures_arrive_at_the_end_at_the_latest() -> None:
    metrics = Metrics()
    recorded = metrics.histogram(Name("fermata.step.duration", "s", "Of a step."), (1, 2), part="forward")
    with receiving() as receiver:
        collector = Collector(receiver.endpoint, PROCESS, metrics.collect)
        for _ in range(3):
            recorded.record(1.5)
        collector.close()
    [point] = receiver.metrics["fermata.step.duration"].histogram.data_points
    assert (list(point.explicit_bounds), list(point.bucket_counts), point.sum) == ([1, 2], [0, 3, 0], 4.5)
    assert 0 < point.start_time_unix_nano < point.time_unix_nano


def test_figures_arrive_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "METRIC_SECONDS", 0.05)
    metrics = Metrics()
    metrics.counter(Name("calls", "{call}", "All."), lambda: 1)
    with receiving() as receiver:
        collector = Collector(receiver.endpoint, PROCESS, metrics.collect)
        until(lambda: len(receiver.resource_metrics) >= 3)
        collector.close()
    points = [process.scope_metrics[0].metrics[0].sum.data_points[0] for process in receiver.resource_metrics]
    assert len({point.start_time_unix_nano for point in points}) == 1
    assert [point.time_unix_nano for point in points] == sorted({point.time_unix_nano for point in points})


def test_a_figure_that_cannot_be_read_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "METRIC_SECONDS", 0.05)
    calls: list[None] = []

    def read() -> float:
        calls.append(None)
        if len(calls) == 1:
            raise ZeroDivisionError
        return 2

    metrics = Metrics()
    metrics.counter(Name("calls", "{call}", "All."), read)
    with receiving() as receiver:
        collector = Collector(receiver.endpoint, PROCESS, metrics.collect)
        until(lambda: "calls" in receiver.metrics)
        collector.close()
    assert "figures could not be sent: ZeroDivisionError()" in caplog.text


@pytest.mark.usefixtures("_narrow")
def test_a_slow_collector_gets_some_spans_and_the_others_are_counted() -> None:
    root = new_trace(sampled=True)
    with receiving() as receiver:
        receiver.open.clear()
        collector = Collector(receiver.endpoint, PROCESS, list)
        for number in range(100):
            collector.offer(token(root, number))
        assert collector.dropped == 92
        receiver.open.set()
        until(lambda: collector.exported == 8)
        collector.offer(token(root, 100))
        collector.close()
    numbers = [span.attributes[0].value.int_value for span in receiver.spans]
    assert numbers == [*range(8), 100]
    assert (collector.exported, collector.dropped) == (9, 92)


@pytest.mark.usefixtures("_hurried")
def test_a_collector_that_hangs_does_not_hold_up_the_end() -> None:
    root = new_trace(sampled=True)
    with receiving() as receiver:
        receiver.open.clear()
        collector = Collector(receiver.endpoint, PROCESS, list)
        for number in range(1000):
            collector.offer(token(root, number))
        closing = threading.Thread(target=collector.close)
        closing.start()
        closing.join()
        collector.offer(token(root))
        assert (collector.exported, collector.dropped) == (0, 1001)


def test_no_collector_is_one_line_in_the_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5")  # the library tries again for ten seconds
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        collector = Collector(f"http://{address}", PROCESS, list)
        root = new_trace(sampled=True)
        with caplog.at_level(logging.DEBUG):
            for number in range(1000):
                collector.offer(token(root, number))
            collector.close()
    assert (collector.exported, collector.dropped) == (0, 1000)
    [record] = [record for record in caplog.records if record.levelno >= logging.INFO]
    assert address in record.getMessage()
    assert "UNAVAILABLE" in record.getMessage()
    assert record.exc_info is None


def test_what_a_collector_refuses_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    with receiving() as receiver:
        receiver.failure = grpc.StatusCode.UNKNOWN
        collector = Collector(receiver.endpoint, PROCESS, list)
        collector.offer(token(new_trace(sampled=True)))
        until(lambda: collector.dropped == 1)
        collector.close()
    assert (collector.exported, collector.dropped) == (0, 1)
    assert "Traceback" not in caplog.text


def test_a_span_that_comes_while_the_queue_is_closed_is_counted() -> None:
    """Another thread closes; the queue ignores what comes then."""
    with receiving() as receiver:
        collector = Collector(receiver.endpoint, PROCESS, list)
        collector._queue.shutdown()
        collector.offer(token(new_trace(sampled=True)))
        collector.close()
    assert (collector.exported, collector.dropped) == (0, 1)


def test_large_spans_go_in_messages_that_are_taken() -> None:
    root = new_trace(sampled=True)
    worst = array("i", [-(2**31)]) * 1024  # the longest text that a number can have
    with receiving() as receiver:
        collector = Collector(receiver.endpoint, PROCESS, list)
        for number in range(20):
            attributes = {f"fermata.token.{part}_us": worst for part in range(20)}
            collector.offer(Span("decode", root.child(number), b"", 1, 2, attributes=attributes))
        until(lambda: collector.exported == 20)
        collector.close()
    assert len(receiver.spans) == 20
    assert 1 << 20 < max(receiver.messages) < 4 << 20
    assert len(receiver.messages) == 3


def test_what_waits_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUED_BYTES", 10_000)
    root = new_trace(sampled=True)
    with receiving() as receiver:
        receiver.open.clear()
        collector = Collector(receiver.endpoint, PROCESS, list)
        large = Span("decode", root.child(), b"", 1, 2, attributes={"times": array("i", [0]) * 1000})
        assert large.weight < 10_000 < 2 * large.weight
        collector.offer(large)
        collector.offer(large)
        assert collector.dropped == 1
        receiver.open.set()
        until(lambda: collector.exported == 1)
        collector.offer(large)
        collector.close()
    assert (collector.exported, collector.dropped) == (2, 1)
