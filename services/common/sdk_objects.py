"""Our spans and figures as the objects of OpenTelemetry's SDK, which its exporters take.

Pure conversions. Knows no exporter. Imported only where something is exported, for the SDK takes its time to import.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from opentelemetry import trace
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags

from services.common.metrics import Figure, Kind
from services.common.otlp import SCOPE
from services.common.tracing import Span, packed

_SCOPE = InstrumentationScope(SCOPE)
_NO_ERROR = Status(StatusCode.UNSET)
_CUMULATIVE = AggregationTemporality.CUMULATIVE


def readable_span(span: Span, resource: Resource) -> ReadableSpan:
    """A span, under the ids and times that it has."""
    context = span.context
    return ReadableSpan(
        span.name,
        _context(context.trace_id, context.span_id, context.flags),
        _context(context.trace_id, span.parent_id, context.flags) if span.parent_id else None,
        resource,
        {name: packed(value) if isinstance(value, array) else value for name, value in span.attributes.items()},
        links=[Link(_context(link.trace_id, link.span_id, link.flags)) for link in span.links],
        kind=trace.SpanKind[span.kind.name],
        status=Status(StatusCode.ERROR, span.error) if span.error else _NO_ERROR,
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=_SCOPE,
    )


def metrics_data(figures: Iterable[Figure], resource: Resource, started_ns: int, now_ns: int) -> MetricsData:
    """All figures of a process as they stand now.

    Args:
        figures: those of one name become one metric.
        resource: the process.
        started_ns: nanoseconds since the epoch; counts are from there on.
        now_ns: the same, of this moment.
    """
    by_name: dict[str, list[Figure]] = {}
    for figure in figures:
        by_name.setdefault(figure.name.name, []).append(figure)
    metrics = [_metric(same, started_ns, now_ns) for same in by_name.values()]
    return MetricsData([ResourceMetrics(resource, [ScopeMetrics(_SCOPE, metrics, "")], "")])


def _context(trace_id: bytes, span_id: bytes, flags: int) -> SpanContext:
    return SpanContext(
        int.from_bytes(trace_id, "big"), int.from_bytes(span_id, "big"), is_remote=False, trace_flags=TraceFlags(flags)
    )


def _metric(figures: Sequence[Figure], started_ns: int, now_ns: int) -> Metric:
    name, kind = figures[0].name, figures[0].kind
    data: Sum | Gauge | Histogram
    if kind is Kind.HISTOGRAM:
        data = Histogram([_histogram(figure, started_ns, now_ns) for figure in figures], _CUMULATIVE)
    else:
        points = [NumberDataPoint(figure.attributes, started_ns, now_ns, figure.value) for figure in figures]
        data = Sum(points, _CUMULATIVE, is_monotonic=True) if kind is Kind.COUNTER else Gauge(points)
    return Metric(name.name, name.description, name.unit, data)


def _histogram(figure: Figure, started_ns: int, now_ns: int) -> HistogramDataPoint:
    return HistogramDataPoint(
        figure.attributes,
        started_ns,
        now_ns,
        count=sum(figure.counts),
        sum=figure.total,
        bucket_counts=figure.counts,
        explicit_bounds=figure.bounds,
        # OTLP has them optional, and the encoder leaves out what is None; they are not counted.
        min=None,  # type: ignore[arg-type]
        max=None,  # type: ignore[arg-type]
    )
