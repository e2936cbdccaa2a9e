"""What a tokenizer counts: calls, and where the time of their tokens went (R25).

Tokens come many at a time. Knows neither streams nor spans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from services.common import metric_names as names
from services.common.metrics import FIRST_TOKEN_BUCKETS, LATENCY_BUCKETS, Metrics
from services.common.timings import Parts
from services.common.types import FinishReason
from services.tokenizer.timing_rows import Matrix

REQUEST_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
"""Those of `gen_ai.server.request.duration` in OpenTelemetry's semantic conventions for generative AI."""
OUTPUT_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
"""Those of `gen_ai.server.time_per_output_token`."""

INTERVAL_PARTS = Parts._fields[Parts._fields.index("wait") :]
"""The parts that every token has."""
_INTERVAL_PLACES = [0, *(Parts._fields.index(part) for part in INTERVAL_PARTS)]
FIRST_PARTS = Parts._fields[1:]
"""The parts of a first token: those and the ones before them."""


class Figures:
    """The counts of one tokenizer."""

    def __init__(self, metrics: Metrics, streams: Callable[[], int]) -> None:
        """`streams` tells how many calls read now."""
        self._metrics = metrics
        columns = [(names.TOKEN_LATENCY, {}), *((names.TOKEN_PART, {"part": part}) for part in INTERVAL_PARTS)]
        self._latency = metrics.table(columns, LATENCY_BUCKETS)
        self._first_latency = metrics.histogram(names.TIME_TO_FIRST_TOKEN, FIRST_TOKEN_BUCKETS)
        self._first_parts = [
            metrics.histogram(names.FIRST_TOKEN_PART, LATENCY_BUCKETS, part=part) for part in FIRST_PARTS
        ]
        self._duration = metrics.histogram(names.REQUEST_DURATION, REQUEST_BUCKETS)
        self._per_token = metrics.histogram(names.TIME_PER_OUTPUT_TOKEN, OUTPUT_TOKEN_BUCKETS)
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        metrics.gauge(names.STREAMS, streams)
        metrics.counter(names.TOLD_TOKENS, lambda: self._counts["tokens"])
        metrics.counter(names.RESUMED, lambda: self._counts["resumes"])
        metrics.counter(names.REATTACHED, lambda: self._counts["reattachments"])
        for reason in FinishReason:
            if reason is not FinishReason.UNSPECIFIED:
                name = reason.name
                metrics.counter(names.FINISHED, lambda name=name: self._counts[name], finish_reason=name)  # type: ignore[misc]

    def tokens(self, parts: Matrix) -> None:
        """Tokens that followed another one were told: their parts in nanoseconds [tokens, fields of `Parts`]."""
        self._counts["tokens"] += len(parts)
        self._latency.record(parts[:, _INTERVAL_PLACES] * 1e-9)

    def first_token(self, parts: Parts) -> None:
        """The first token of a choice was told, by the call that opened its generation."""
        self._counts["tokens"] += 1
        self._first_latency.record(parts.interval * 1e-9)
        for histogram, value in zip(self._first_parts, parts[1:], strict=True):
            histogram.record(value * 1e-9)

    def finished(self, reason: FinishReason) -> None:
        """A choice has ended, as one reader was told."""
        self._counts[reason.name] += 1

    def request(self, seconds: float, tokens: int, first_seconds: float) -> None:
        """A call that opened a generation is over.

        Args:
            seconds: from its arrival.
            tokens: that it was told.
            first_seconds: until the first of them; meaningless without one.
        """
        self._duration.record(seconds)
        if tokens > 1:
            self._per_token.record((seconds - first_seconds) / (tokens - 1))

    def failed(self, reason: str) -> None:
        """A call ended with an error."""
        if reason not in self._failures:
            self._metrics.counter(names.FAILED_CALLS, lambda: self._failures[reason], error_type=reason)
        self._failures[reason] += 1

    def resumed(self) -> None:
        """A call resumes a generation."""
        self._counts["resumes"] += 1

    def reattached(self) -> None:
        """A reader goes on at an orchestrator after a break."""
        self._counts["reattachments"] += 1
