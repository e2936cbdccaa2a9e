"""What a shard tells of its work: spans of sequences and steps, and counts.

Told by the service; decides nothing and knows no message.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from services.common import attributes as names
from services.common import metric_names as metrics
from services.common.metrics import LATENCY_BUCKETS, SIZE_BUCKETS
from services.common.telemetry import Telemetry
from services.common.tracing import Span, TraceContext, is_chosen, since_epoch, unpack
from services.shard.engine import Report
from services.shard.steps import StepLog, StepRecord


class _Sequence(NamedTuple):
    """A sequence that is here. `arrived_ns` is on this process's monotonic clock."""

    generation_id: str
    choice: int
    admission: TraceContext
    arrived_ns: int


class Observer:
    """Makes spans and counts."""

    def __init__(self, telemetry: Telemetry, shard: str, block_count: int) -> None:
        """`shard` is the process id that names it; it has so many KV blocks."""
        self._telemetry, self._shard, self._block_count = telemetry, shard, block_count
        self._steps = StepLog(shard)
        self._here: dict[tuple[int, int], _Sequence] = {}
        self._latest: Report | None = None
        registry = telemetry.metrics
        self._duration = registry.histogram(metrics.STEP_DURATION, LATENCY_BUCKETS)
        self._sequences = registry.histogram(metrics.STEP_SEQUENCES, SIZE_BUCKETS)
        self._tokens = registry.histogram(metrics.STEP_TOKENS, SIZE_BUCKETS)
        registry.gauge(metrics.KV_BLOCKS, lambda: block_count)
        registry.gauge(metrics.KV_USAGE, self._usage)
        registry.gauge(metrics.RUNNING, lambda: self._load("running"))
        registry.gauge(metrics.WAITING, lambda: self._load("waiting"))
        registry.counter(metrics.COMPUTED_TOKENS, lambda: self._load("computed_tokens"))
        registry.counter(metrics.DRAWN_TOKENS, lambda: self._load("drawn_tokens"))
        registry.counter(metrics.PREFIX_TOKENS, lambda: self._load("cached_tokens"))
        registry.counter(metrics.PREEMPTIONS, lambda: self._load("preemptions"))
        registry.counter(metrics.ENGINE_CPU, lambda: self._latest.engine_cpu_ns / 1e9 if self._latest else 0.0)
        telemetry.remember_also(self._steps.spans)

    def admitted(self, link: int, attempt: int, generation_id: str, choice: int, trace_context: bytes) -> None:
        """A sequence has arrived."""
        admission = unpack(trace_context)
        if admission is not None:
            self._here[link, attempt] = _Sequence(generation_id, choice, admission, time.monotonic_ns())

    def left(self, link: int, attempt: int, error: str = "") -> None:
        """A sequence is gone; `error` says why, unless that is as it should be."""
        sequence = self._here.pop((link, attempt), None)
        if sequence is None:
            return
        span = Span(
            "sequence",
            sequence.admission.child(),
            sequence.admission.span_id,
            since_epoch(sequence.arrived_ns),
            since_epoch(time.monotonic_ns()),
            attributes={
                names.GENERATION_ID: sequence.generation_id,
                names.CHOICE: sequence.choice,
                names.SHARD: self._shard,
            },
            error=error,
        )
        self._telemetry.record(sequence.generation_id, span)
        if sequence.admission.sampled and is_chosen(sequence.admission, self._telemetry.settings.waterfall_share):
            self.collect(sequence.generation_id)

    def link_closed(self, link: int, error: str = "") -> None:
        """All sequences of a link are gone."""
        for number, attempt in [key for key in self._here if key[0] == link]:
            self.left(number, attempt, error)

    def collect(self, generation_id: str) -> None:
        """Hands the steps that a generation was in to the collector, as far as they are remembered."""
        for span in self._steps.uncollected(generation_id):
            self._telemetry.export(span)

    def reported(self, report: Report) -> None:
        """The engine has done something."""
        self._latest = report
        timings = report.timings
        if timings is not None and report.generations and self._telemetry.active:
            self._duration.record((timings.departed - timings.started) / 1e9)
            self._sequences.record(len(report.generations))
            self._tokens.record(sum(report.lengths))
            self._steps.add(StepRecord(report.load.steps, timings, report.generations, report.lengths))

    def _load(self, name: str) -> float:
        return float(getattr(self._latest.load, name)) if self._latest is not None else 0.0

    def _usage(self) -> float:
        free = self._latest.load.free_blocks if self._latest is not None else self._block_count
        return 1 - free / self._block_count
