"""A process remembers its spans, counts, and tells both to whom the settings say."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from dataclasses import replace

import pytest
from opentelemetry import metrics as global_metrics
from opentelemetry import trace as global_trace
from prometheus_client.parser import text_string_to_metric_families

from services.common import metric_names
from services.common.telemetry import NO_PORT, Telemetry, TelemetrySettings
from services.common.tracing import Span, new_trace
from tests.unit.common.otlp_receiver import receiving

GENERATION = "a" * 26 + "." + "0" * 16


def span(name: str = "chat", *, sampled: bool = True) -> Span:
    return Span(name, new_trace(sampled=sampled), b"", 1, 2)


def names_in(document: bytes) -> list[str]:
    entries = json.loads(document)["resourceSpans"]
    return [span["name"] for entry in entries for scope in entry["scopeSpans"] for span in scope["spans"]]


def figures(telemetry: Telemetry) -> dict[str, float]:
    return {figure.name.name: figure.value for figure in telemetry.metrics.collect()}


def test_spans_are_remembered_whether_they_are_collected_or_not() -> None:
    telemetry = Telemetry("shard", TelemetrySettings())
    telemetry.record(GENERATION, span("one"))
    telemetry.record(GENERATION, span("two", sampled=False))
    telemetry.record("other", span("three"))
    telemetry.export(span("four"))
    document = telemetry.document(GENERATION)
    assert names_in(document) == ["one", "two"]
    attributes = json.loads(document)["resourceSpans"][0]["resource"]["attributes"]
    assert {"key": "service.name", "value": {"stringValue": "fermata-shard"}} in attributes
    assert telemetry.document("unknown") == b""
    telemetry.close()


def test_a_span_of_no_generation_is_not_remembered() -> None:
    """They would fill the memory, and nobody could ask for them."""
    telemetry = Telemetry("tokenizer", TelemetrySettings())
    telemetry.record("", span())
    assert telemetry.recorder.weight == 0
    telemetry.close()


def test_other_places_are_asked_too() -> None:
    telemetry = Telemetry("shard", TelemetrySettings())
    telemetry.remember_also(lambda generation_id: iter([span(f"step of {generation_id}")]))
    telemetry.record("one", span("sequence"))
    assert names_in(telemetry.document("one")) == ["sequence", "step of one"]
    assert names_in(telemetry.document("two")) == ["step of two"]
    telemetry.close()


def test_memory_is_as_large_as_the_settings_say() -> None:
    telemetry = Telemetry("shard", TelemetrySettings(recorded_bytes=5 * span().weight))
    for number in range(20):
        telemetry.record(str(number), span())
    assert [bool(telemetry.document(str(number))) for number in range(20)] == [False] * 15 + [True] * 5
    telemetry.close()


def test_sampled_spans_are_collected() -> None:
    with receiving() as receiver:
        telemetry = Telemetry("orchestrator", TelemetrySettings(otlp_endpoint=receiver.endpoint))
        telemetry.record(GENERATION, span("one"))
        telemetry.record(GENERATION, span("two", sampled=False))
        telemetry.export(span("three", sampled=False))
        telemetry.close()
    assert [received.name for received in receiver.spans] == ["one", "three"]
    assert names_in(telemetry.document(GENERATION)) == ["one", "two"]
    counted = figures(telemetry)
    assert counted[metric_names.SPANS_EXPORTED.name] == 2
    assert counted[metric_names.SPANS_DROPPED.name] == 0
    assert metric_names.PROCESS_CPU.name in receiver.metrics


def test_lost_spans_are_counted_and_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        telemetry = Telemetry("orchestrator", TelemetrySettings(otlp_endpoint=receiver.endpoint))
        monkeypatch.setattr("services.common.collector.CLOSE_SECONDS", 0.1)
        receiver.open.clear()
        telemetry.export(span())
        telemetry.close()
        assert figures(telemetry)[metric_names.SPANS_DROPPED.name] == 1
    assert "did not get 1 of the spans" in caplog.text


def test_prometheus_reads_the_same_figures() -> None:
    telemetry = Telemetry("shard", TelemetrySettings(metrics_port=0))
    telemetry.metrics.histogram(metric_names.STEP_DURATION, (0.01, 0.1)).record(0.05)
    with urllib.request.urlopen(f"http://127.0.0.1:{telemetry.metrics_port}/metrics") as answer:
        families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    telemetry.close()
    assert [sample.value for sample in families["fermata_step_duration_seconds"].samples] == [0, 1, 1, 1, 0.05]
    assert families["process_cpu_time_seconds"].samples[0].value > 0
    assert families["process_memory_usage_bytes"].samples[0].value > 1 << 20


def test_nothing_is_opened_unless_it_is_wanted() -> None:
    telemetry = Telemetry("shard", TelemetrySettings())
    assert telemetry.metrics_port == NO_PORT
    telemetry.close()


def test_nobody_looks_when_all_is_off() -> None:
    quiet = TelemetrySettings(recorded_bytes=0, metrics_port=NO_PORT)
    assert not Telemetry("shard", quiet).active
    for settings in (replace(quiet, recorded_bytes=1), replace(quiet, metrics_port=0)):
        telemetry = Telemetry("shard", settings)
        assert telemetry.active
        telemetry.close()


def test_other_libraries_are_left_alone() -> None:
    before = global_trace.get_tracer_provider(), global_metrics.get_meter_provider()
    with receiving() as receiver:
        telemetry = Telemetry("shard", TelemetrySettings(otlp_endpoint=receiver.endpoint, metrics_port=0))
        telemetry.record(GENERATION, span())
        telemetry.close()
    assert (global_trace.get_tracer_provider(), global_metrics.get_meter_provider()) == before


def test_it_is_imported_without_what_it_may_not_need() -> None:
    program = (
        "import sys; from services.common.telemetry import Telemetry, TelemetrySettings;"
        "Telemetry('shard', TelemetrySettings()).close();"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "services" in imported
    assert not imported & {"opentelemetry", "prometheus_client", "grpc"}
