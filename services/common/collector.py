"""The way of spans and figures to a collector: OTLP over gRPC, by OpenTelemetry's exporters on threads of their own.

Whatever the collector does, the service goes on: what waits is bounded by number and by size, a span that does not
arrive is counted, and the log gets one line now and then. No provider is set for the process: what other libraries
trace is left alone. Knows no settings.

Figures are pushed by a plain thread: the SDK's periodic reader wants a meter provider and instruments to read, and ours
are counted elsewhere.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk import resources
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, TraceFlags

from services.common.metrics import Figure
from services.common.otlp import Resource
from services.common.sdk_objects import metrics_data, readable_span
from services.common.tracing import Span

log = logging.getLogger(__name__)

QUEUED_SPANS = 16384
"""Spans that wait at most."""
QUEUED_BYTES = 64 << 20
"""Their weight at most."""
BATCH_SPANS = 256
"""A batch is encoded in one go, while the event loop waits for its turn."""
BATCH_MILLISECONDS = 1000
MESSAGE_BYTES = 3 << 19
"""Weight of the spans in a message: what they take on the wire stays below the 4 MiB that collectors take."""
METRIC_SECONDS = 10.0
CLOSE_SECONDS = 2.0
QUIET_SECONDS = 60.0
"""Between two lines in the log about a collector that does not do its part."""

_SAMPLED = SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


class _Quiet(logging.Filter):
    """Lets one error through now and then, as one line; attempts that are repeated are nobody's concern."""

    def __init__(self) -> None:
        super().__init__()
        self._quiet_until = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if record.levelno < logging.ERROR or now < self._quiet_until:
            return False
        self._quiet_until = now + QUIET_SECONDS
        record.exc_info = None
        return True


_quiet = _Quiet()
_EXPORTER_LOG = "opentelemetry.exporter.otlp.proto.grpc.exporter"


class _Waiting(ReadableSpan):
    """A span in the queue: the exporter's thread turns it into what is sent."""

    def __init__(self, span: Span, weight: int, process: resources.Resource) -> None:
        # The queue looks at nothing but the flags, and whether a span is handed on is decided before.
        super().__init__(span.name, _SAMPLED, resource=process)
        self.span, self.weight = span, weight


class _Sender(SpanExporter):
    """Sends batches in messages that are not too big, and counts what becomes of each span.

    Attributes:
        sent: spans that the collector took.
        failed: spans that it did not take.
        weight: of both, in bytes.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self.sent = self.failed = self.weight = 0
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends a batch."""
        for message in _messages(span for span in spans if isinstance(span, _Waiting)):
            if self._arrives([readable_span(waiting.span, waiting.resource) for waiting in message]):
                self.sent += len(message)
            else:
                self.failed += len(message)
            self.weight += sum(waiting.weight for waiting in message)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Ends the connection."""
        self._exporter.shutdown()

    def _arrives(self, spans: Sequence[ReadableSpan]) -> bool:
        try:
            return self._exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception as error:  # the library's own, as when it is shut down in the middle
            log.error("spans could not be sent: %r", error)
            return False


class Collector:
    """The connection to a collector. `offer` belongs to one thread.

    Attributes:
        exported: spans that the collector took.
        dropped: spans that it did not get and will not get.
    """

    def __init__(self, endpoint: str, process: Resource, collect: Callable[[], Iterable[Figure]]) -> None:
        """Connects in the background.

        Args:
            endpoint: URL of its OTLP/gRPC port; TLS only with `https:`. Headers and certificates are what
                OpenTelemetry's own variables say, which its exporters read by themselves.
            process: what the spans and figures are about.
            collect: gives the figures; called on a thread of its own.
        """
        for name in (_EXPORTER_LOG, __name__):
            logging.getLogger(name).addFilter(_quiet)
        insecure = not endpoint.startswith("https:")
        self._process = resources.Resource(process)
        self._collect = collect
        self._started_ns = time.time_ns()
        self._offered = self._offered_weight = self._refused = 0
        self._closed = threading.Event()
        self._ended = False
        self._span_exporter = OTLPSpanExporter(endpoint, insecure=insecure)
        self._metric_exporter = OTLPMetricExporter(endpoint, insecure=insecure)
        self._sender = _Sender(self._span_exporter)
        self._queue: SpanProcessor = BatchSpanProcessor(
            self._sender,
            max_queue_size=QUEUED_SPANS,
            schedule_delay_millis=BATCH_MILLISECONDS,
            max_export_batch_size=BATCH_SPANS,
        )
        self._pushing = threading.Thread(target=self._push, name="fermata-metrics", daemon=True)
        self._pushing.start()

    @property
    def exported(self) -> int:
        """Safe on any thread."""
        return self._sender.sent

    @property
    def dropped(self) -> int:
        """Safe on any thread."""
        return self._refused + self._sender.failed + (self._waiting if self._ended else 0)

    @property
    def _waiting(self) -> int:
        """Spans in the queue and on their way."""
        return self._offered - self._sender.sent - self._sender.failed

    def offer(self, span: Span) -> None:
        """Hands a span on when there is room. Never waits."""
        weight = span.weight
        # The library's queue would drop the oldest one, and tell nobody but its own metrics.
        if (
            self._closed.is_set()
            or self._waiting >= QUEUED_SPANS
            or self._offered_weight + weight - self._sender.weight > QUEUED_BYTES
        ):
            self._refused += 1
            return
        self._offered += 1
        self._offered_weight += weight
        self._queue.on_end(_Waiting(span, weight, self._process))

    def close(self) -> None:
        """Sends what is left, for `CLOSE_SECONDS` and little more at most."""
        self._closed.set()
        cut = threading.Timer(CLOSE_SECONDS, self._cut)
        cut.daemon = True
        cut.start()
        self._queue.shutdown()
        self._pushing.join()
        cut.cancel()
        self._metric_exporter.shutdown()
        self._ended = True

    def _cut(self) -> None:
        """Ends attempts that still run; those that follow fail at once."""
        self._span_exporter.shutdown()
        self._metric_exporter.shutdown()

    def _push(self) -> None:
        """Sends the figures now and then, and a last time at the end."""
        ended = False
        while not ended:
            ended = self._closed.wait(METRIC_SECONDS)
            try:
                data = metrics_data(self._collect(), self._process, self._started_ns, time.time_ns())
                self._metric_exporter.export(data)
            except Exception as error:
                log.error("figures could not be sent: %r", error)


def _messages(spans: Iterable[_Waiting]) -> Iterator[list[_Waiting]]:
    """Cuts a batch into messages."""
    message: list[_Waiting] = []
    weight = 0
    for waiting in spans:
        if message and weight + waiting.weight > MESSAGE_BYTES:
            yield message
            message, weight = [], 0
        message.append(waiting)
        weight += waiting.weight
    if message:
        yield message
