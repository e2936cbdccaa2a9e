"""Figures as OpenTelemetry's own encoder sees them. Spans are in `test_otlp.py`, where both forms meet."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Metric
from opentelemetry.sdk.resources import Resource

from services.common.metrics import Histogram, Metrics, Name
from services.common.sdk_objects import metrics_data

STARTED, NOW = 10**18, 10**18 + 10**9


def encoded(metrics: Metrics) -> list[Metric]:
    request = encode_metrics(metrics_data(metrics.collect(), Resource({"service.name": "one"}), STARTED, NOW))
    [process] = request.resource_metrics
    [scope] = process.scope_metrics
    assert process.resource.attributes[0].value.string_value == "one"
    assert scope.scope.name == "fermata"
    return list(scope.metrics)


def test_a_histogram_keeps_its_buckets() -> None:
    metrics = Metrics()
    name = Name("fermata.step.duration", "s", "Of a step.")
    recorded: Histogram = metrics.histogram(name, (1, 2, 4), part="forward")
    for value in (0.5, 1, 3, 9, 10):
        recorded.record(value)
    metrics.histogram(name, (1, 2, 4), part="sample")
    [metric] = encoded(metrics)
    assert (metric.name, metric.unit, metric.description) == name
    assert metric.histogram.aggregation_temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    point, empty = metric.histogram.data_points
    assert [(item.key, item.value.string_value) for item in point.attributes] == [("part", "forward")]
    assert (point.start_time_unix_nano, point.time_unix_nano) == (STARTED, NOW)
    assert (list(point.explicit_bounds), list(point.bucket_counts)) == ([1, 2, 4], [2, 0, 1, 2])
    assert (point.count, point.sum) == (5, 23.5)
    assert not point.HasField("min")
    assert not point.HasField("max")
    assert (empty.count, list(empty.bucket_counts)) == (0, [0, 0, 0, 0])


def test_a_counter_counts_from_the_start_and_a_gauge_just_is() -> None:
    metrics = Metrics()
    metrics.counter(Name("calls", "{call}", "All."), lambda: 7, kind="old")
    metrics.counter(Name("calls", "{call}", "All."), lambda: 8, kind="new")
    metrics.gauge(Name("usage", "1", "Now."), lambda: 0.5)
    calls, usage = encoded(metrics)
    assert calls.sum.is_monotonic
    assert calls.sum.aggregation_temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    assert [point.as_double for point in calls.sum.data_points] == [7, 8]
    assert {point.start_time_unix_nano for point in calls.sum.data_points} == {STARTED}
    assert [point.as_double for point in usage.gauge.data_points] == [0.5]
