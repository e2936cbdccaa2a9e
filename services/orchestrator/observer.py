"""What an orchestrator tells of its work: spans of ownerships and admissions, and counts.

Told by the parts that act; decides nothing and knows no call.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from services.common import attributes as names
from services.common import metric_names as metrics
from services.common.metrics import LATENCY_BUCKETS
from services.common.telemetry import Telemetry
from services.common.tracing import Attribute, Span, TraceContext, current_call, since_epoch, span_id
from services.orchestrator.generation import Generation
from services.orchestrator.sequence import Sequence

if TYPE_CHECKING:
    from services.orchestrator.owner import Owner
    from services.orchestrator.sessions import SessionStore


class Admission(NamedTuple):
    """A choice on a shard.

    Attributes:
        generation: whose choice it is.
        sequence: the choice.
        shard: process id of the shard.
        context: of the span.
        began_ns: on this process's monotonic clock.
    """

    generation: Generation
    sequence: Sequence
    shard: str
    context: TraceContext
    began_ns: int


class Observer:
    """Makes spans and counts."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._counts: Counter[str] = Counter()
        self._lag = telemetry.metrics.histogram(metrics.COMMIT_LAG, LATENCY_BUCKETS)
        telemetry.metrics.counter(metrics.OPENED, lambda: self._counts["opened"])
        telemetry.metrics.counter(metrics.TAKEOVERS, lambda: self._counts["takeovers"])
        telemetry.metrics.counter(metrics.READMISSIONS, lambda: self._counts["readmissions"])

    @property
    def active(self) -> bool:
        """Somebody may look."""
        return self._telemetry.active

    def count(self, store: SessionStore, owner: Owner) -> None:
        """Counts what these count by themselves."""
        registry = self._telemetry.metrics
        registry.gauge(metrics.GENERATIONS, lambda: len(owner.generations))
        registry.gauge(metrics.STORE_CUT_OFF, lambda: owner.writer.cut_off)
        registry.counter(metrics.STORE_CALLS, lambda: store.calls)
        registry.counter(metrics.STORED_TOKENS, lambda: store.appended_tokens)
        registry.counter(metrics.WASTED_TOKENS, lambda: owner.wasted_tokens)

    # --- ownership ---------------------------------------------------------------------------------------------

    def opened(self, generation: Generation) -> None:
        """A generation was made by the call that is served now: its `opening` is complete."""
        self._counts["opened"] += 1
        served = current_call()
        if served is None or generation.opening is None:
            return
        served.generation_id = generation.name.generation_id
        began, claimed, placed = generation.opening
        for name, start, end in (("claim", began, claimed), ("place", claimed, placed)):
            self._record(generation, Span(name, *_below(served.context), since_epoch(start), since_epoch(end)))

    def claimed(self, generation: Generation, began_ns: int, *, former_epoch: int, was_parked: bool) -> None:
        """A generation was taken from the owner of a former epoch, which took from `began_ns` until now."""
        if not was_parked:
            self._counts["takeovers"] += 1
        former = self._ownership(generation, former_epoch)
        name = "resume" if was_parked else "takeover"
        span = Span(
            name,
            *_below(self._ownership(generation, generation.epoch)),
            since_epoch(began_ns),
            since_epoch(time.monotonic_ns()),
            attributes={names.EPOCH: generation.epoch},
            links=(former,),
        )
        generation.former = former
        self._record(generation, span)

    def adopted(self, generation: Generation) -> None:
        """The ownership begins."""
        generation.owned_ns = time.monotonic_ns()

    def forgotten(self, generation: Generation) -> None:
        """The ownership ends."""
        attributes: dict[str, Attribute] = {
            names.EPOCH: generation.epoch,
            names.GENERATION_ID: generation.name.generation_id,
        }
        span = Span(
            "own",
            self._ownership(generation, generation.epoch),
            generation.spec.trace.span_id,
            since_epoch(generation.owned_ns),
            since_epoch(time.monotonic_ns()),
            attributes=attributes,
            links=(generation.former,) if generation.former is not None else (),
        )
        self._record(generation, span)

    # --- admissions --------------------------------------------------------------------------------------------

    def admission(self, generation: Generation, sequence: Sequence, shard: str) -> Admission:
        """A choice goes to a shard."""
        if sequence.admissions:
            self._counts["readmissions"] += 1
        sequence.admissions += 1
        context = self._ownership(generation, generation.epoch).child()
        return Admission(generation, sequence, shard, context, time.monotonic_ns())

    def admission_over(self, admission: Admission, error: str = "") -> None:
        """The choice is on that shard no more; `error` says why, unless that is as it should be."""
        generation = admission.generation
        attributes: dict[str, Attribute] = {names.SHARD: admission.shard, names.CHOICE: admission.sequence.choice}
        if admission.sequence.cached_tokens is not None:
            attributes[names.CACHED_TOKENS] = admission.sequence.cached_tokens
        span = Span(
            "admission",
            admission.context,
            self._ownership(generation, generation.epoch).span_id,
            since_epoch(admission.began_ns),
            since_epoch(time.monotonic_ns()),
            attributes=attributes,
            error=error,
        )
        self._record(generation, span)

    # --- the log -----------------------------------------------------------------------------------------------

    def stored(self, sequence: Sequence, first_offset: int) -> None:
        """The store has acknowledged an append that began at this offset."""
        step = sequence.steps[first_offset]
        if step is not None:
            self._lag.record((time.monotonic_ns() - step.arrived) / 1e9)

    def _ownership(self, generation: Generation, epoch: int) -> TraceContext:
        """The span of an ownership: whoever takes over knows what the former owner's is called."""
        return generation.spec.trace._replace(span_id=span_id(generation.name.generation_id, "own", epoch))

    def _record(self, generation: Generation, span: Span) -> None:
        self._telemetry.record(generation.name.generation_id, span)


def _below(parent: TraceContext) -> tuple[TraceContext, bytes]:
    """Context and parent of a new span."""
    return parent.child(), parent.span_id
