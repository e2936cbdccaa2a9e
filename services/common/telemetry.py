"""What a process tells of itself: the spans that it remembers, the figures that it counts, and their ways out.

Spans and figures go to a collector (`collector.py`) and figures to Prometheus (`prometheus.py`), when the settings say
so. Both are imported only then, for their libraries take longer to import than the rest of a service together. Knows
no service and reads no environment.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from services.common import metric_names as names
from services.common import otlp
from services.common.metrics import Metrics
from services.common.targets import announce_target
from services.common.tracing import Recorder, Span

if TYPE_CHECKING:
    from services.common.collector import Collector
    from services.common.prometheus import Endpoint

log = logging.getLogger(__name__)

NO_PORT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetrySettings:
    """How much is remembered, and where it goes.

    Attributes:
        otlp_endpoint: URL of a collector's OTLP/gRPC port; empty for none.
        metrics_host: address that Prometheus reads at.
        metrics_port: its port; 0 takes a free one, `NO_PORT` none.
        metrics_targets: folder in which Prometheus looks for it; empty for none.
        recorded_bytes: of spans that are remembered.
        trace_share: of the requests that begin here, 0 to 1, whose trace is collected.
        waterfall_share: of these, those that have a span for each token.
        slow_token: seconds between two tokens from which on a request is slow.
        slow_first_token: seconds to the first token from which on it is.
    """

    otlp_endpoint: str = ""
    metrics_host: str = "127.0.0.1"
    metrics_port: int = NO_PORT
    metrics_targets: str = ""
    recorded_bytes: int = 32 << 20
    trace_share: float = 1.0
    waterfall_share: float = 0.01
    slow_token: float = 0.25
    slow_first_token: float = 2.0


class Telemetry:
    """The spans and figures of a process. Spans come from one thread, the event loop's.

    Attributes:
        service: tokenizer, orchestrator or shard.
        settings: what it was made with.
        metrics: what is counted.
        recorder: what is remembered.
        metrics_port: where Prometheus can read; `NO_PORT` when it cannot.
    """

    def __init__(self, service: str, settings: TelemetrySettings) -> None:
        """Opens the ways out.

        Raises:
            OSError: nobody can listen at `metrics_host`.
        """
        self.service = service
        self.settings = settings
        self.metrics = Metrics()
        self.recorder = Recorder(settings.recorded_bytes)
        self._process = otlp.resource(service, instance_id=secrets.token_hex(16), node=socket.gethostname())
        self._sources: list[Callable[[str], Iterable[Span]]] = [self.recorder.spans]
        self._collector: Collector | None = None
        self._endpoint: Endpoint | None = None
        self.metrics.counter(names.PROCESS_CPU, time.process_time)
        self.metrics.gauge(names.PROCESS_MEMORY, _resident_bytes)
        self.metrics.counter(names.SPANS_EXPORTED, lambda: self._collector.exported if self._collector else 0)
        self.metrics.counter(names.SPANS_DROPPED, lambda: self._collector.dropped if self._collector else 0)
        if settings.otlp_endpoint:
            from services.common.collector import Collector  # noqa: PLC0415

            self._collector = Collector(settings.otlp_endpoint, self._process, self.metrics.collect)
        if settings.metrics_port != NO_PORT:
            from services.common.prometheus import Endpoint, Exposition  # noqa: PLC0415

            exposition = Exposition(self.metrics, self._process)
            self._endpoint = Endpoint(exposition, settings.metrics_host, settings.metrics_port)
        self._target: Path | None = None
        if self._endpoint is not None and settings.metrics_targets:
            address = f"{settings.metrics_host}:{self._endpoint.port}"
            self._target = announce_target(Path(settings.metrics_targets), service, address)

    @property
    def active(self) -> bool:
        """Somebody may look: spans are remembered or collected, or figures are read."""
        settings = self.settings
        return bool(settings.otlp_endpoint or settings.recorded_bytes) or settings.metrics_port != NO_PORT

    @property
    def metrics_port(self) -> int:
        """The port that was bound."""
        return self._endpoint.port if self._endpoint is not None else NO_PORT

    def record(self, generation_id: str, span: Span) -> None:
        """Remembers a span, unless it belongs to no generation, and hands it on when its trace is collected."""
        if generation_id:
            self.recorder.record(generation_id, span)
        if span.context.sampled:
            self.export(span)

    def export(self, span: Span) -> None:
        """Hands a span to the collector, if there is one, and remembers nothing. Never waits."""
        if self._collector is not None:
            self._collector.offer(span)

    def remember_also(self, spans: Callable[[str], Iterable[Span]]) -> None:
        """Names another place where spans are remembered; it is asked for those of a generation."""
        self._sources.append(spans)

    def document(self, generation_id: str) -> bytes:
        """All that is remembered of a generation, as `otlp.py` writes it; empty when nothing is."""
        spans = [span for source in self._sources for span in source(generation_id)]
        return otlp.write_document(self._process, spans) if spans else b""

    def close(self) -> None:
        """Sends what is left, for about two seconds at most, and ends the ways out. Blocks meanwhile."""
        if self._collector is not None:
            self._collector.close()
            if dropped := self._collector.dropped:
                log.warning("the collector did not get %d of the spans of this process", dropped)
        if self._target is not None:
            self._target.unlink(missing_ok=True)
        if self._endpoint is not None:
            self._endpoint.close()


def _resident_bytes() -> float:
    """Of this process."""
    return float(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
