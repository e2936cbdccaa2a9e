"""Spans: what they are, what names them, and the ones that this process remembers.

A span is made after the fact, when its end is known, from moments that were taken down anyway. Its id has an address
where others must be able to link to it: it is a hash of what the span stands for, so nobody has to be told. The
recorder keeps the spans of recent generations, whether anybody collects them or not; `telemetry.py` sends them on.
Knows neither OpenTelemetry's classes nor gRPC. Source of the formats: W3C Trace Context, level 1.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, TypeAlias

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_SAMPLED = 1

Attribute: TypeAlias = "bool | int | float | str | Sequence[str] | array[int]"
"""What an attribute can be. An array of numbers is handed on as `packed` writes it."""


def packed(numbers: array[int]) -> str:
    """Numbers as the text of a JSON array: in OTLP's own arrays each would take ten times as long to write."""
    return str(numbers.tolist())


class TraceContext(NamedTuple):
    """Names a span across processes.

    Attributes:
        trace_id: 16 bytes.
        span_id: 8 bytes.
        flags: bit 0 says that the trace is collected.
    """

    trace_id: bytes
    span_id: bytes
    flags: int

    @property
    def sampled(self) -> bool:
        """The trace is collected."""
        return bool(self.flags & _SAMPLED)

    @property
    def traceparent(self) -> str:
        """As a header."""
        return f"00-{self.trace_id.hex()}-{self.span_id.hex()}-{self.flags:02x}"

    def pack(self) -> bytes:
        """As 25 bytes: trace id, span id, flags."""
        return self.trace_id + self.span_id + bytes([self.flags])

    def child(self, *address: object) -> TraceContext:
        """Another span of this trace: the one at an address, or a new one without."""
        return self._replace(span_id=span_id(*address) if address else secrets.token_bytes(8))


def new_trace(*, sampled: bool) -> TraceContext:
    """A root of a new trace."""
    return TraceContext(secrets.token_bytes(16), secrets.token_bytes(8), _SAMPLED if sampled else 0)


def parse_traceparent(header: str) -> TraceContext | None:
    """The context of a `traceparent` header; None when it is not valid."""
    match = _TRACEPARENT.fullmatch(header)
    if match is None:
        return None
    trace_id, parent_id, flags = (bytes.fromhex(group) for group in match.groups())
    return TraceContext(trace_id, parent_id, flags[0]) if any(trace_id) and any(parent_id) else None


def unpack(packed: bytes) -> TraceContext | None:
    """Inverse of `TraceContext.pack`; None for anything else."""
    return TraceContext(packed[:16], packed[16:24], packed[24]) if len(packed) == 25 else None


def step_context(shard: str, number: int) -> TraceContext:
    """Names the span of a step: a trace of its own, which those of the generations that were in it link to."""
    return TraceContext(trace_id(shard, number), span_id(shard, number), _SAMPLED)


def span_id(*address: object) -> bytes:
    """The 8 bytes that name the span at an address."""
    return hashlib.blake2b("\0".join(map(str, address)).encode(), digest_size=8).digest()


def trace_id(*address: object) -> bytes:
    """The 16 bytes that name the trace at an address."""
    return hashlib.blake2b("\0".join(map(str, address)).encode(), digest_size=16).digest()


def is_chosen(context: TraceContext, share: float) -> bool:
    """Whether a trace is among a share of all: the same answer in every process."""
    return int.from_bytes(context.trace_id[8:], "big") < share * 2**64


@dataclass(slots=True)
class TracedCall:
    """A call that this process serves now.

    Attributes:
        context: its span.
        parent_id: the caller's span; empty without one.
        generation_id: what it is about, once that is known.
        made: spans of calls that were made for it; they are recorded with its own.
    """

    context: TraceContext
    parent_id: bytes = b""
    generation_id: str = ""
    made: list[Span] = field(default_factory=list)


_call: ContextVar[TracedCall | None] = ContextVar("traced call", default=None)


def current_call() -> TracedCall | None:
    """The call that is served here; None outside of one, and in one that nobody traces."""
    return _call.get()


def begin_call(call: TracedCall) -> None:
    """Makes a call the current one of the task that serves it."""
    _call.set(call)


class SpanKind(IntEnum):
    """The numbers are OTLP's."""

    INTERNAL = 1
    SERVER = 2
    CLIENT = 3


@dataclass(frozen=True, slots=True)
class Span:
    """Something that was done, with its begin and its end.

    Attributes:
        name: what was done.
        context: its own name.
        parent_id: of the span that it is a part of; empty for a root.
        start_ns, end_ns: nanoseconds since the epoch, on this machine's clock.
        kind: see `SpanKind`.
        attributes: what else is known.
        links: spans that it has to do with.
        error: why it failed; empty when it did not.
    """

    name: str
    context: TraceContext
    parent_id: bytes
    start_ns: int
    end_ns: int
    kind: SpanKind = SpanKind.INTERNAL
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    links: Sequence[TraceContext] = ()
    error: str = ""

    @property
    def weight(self) -> int:
        """About how many bytes of memory it takes."""
        arrays = sum(len(value) for value in self.attributes.values() if isinstance(value, (str, Sequence)))
        return 600 + 100 * len(self.attributes) + 8 * arrays + 150 * len(self.links)


def epoch_offset() -> int:
    """What to add to a moment of this process's monotonic clock for nanoseconds since the epoch, as both stand now."""
    return time.time_ns() - time.monotonic_ns()


def since_epoch(monotonic_ns: int) -> int:
    """A moment of this process's monotonic clock in nanoseconds since the epoch."""
    return monotonic_ns + epoch_offset()


class Recorder:
    """The spans of the generations that were here last.

    Attributes:
        weight: of all that is remembered, in bytes.
    """

    def __init__(self, most_bytes: int) -> None:
        """Remembers up to so many bytes; the generation that is longest without a new span is forgotten first."""
        self.weight = 0
        self._most_bytes = most_bytes
        self._spans: OrderedDict[str, list[Span]] = OrderedDict()

    def record(self, generation_id: str, span: Span) -> None:
        """Remembers a span of a generation."""
        self._spans.setdefault(generation_id, []).append(span)
        self._spans.move_to_end(generation_id)
        self.weight += span.weight
        while self.weight > self._most_bytes:
            _, forgotten = self._spans.popitem(last=False)
            self.weight -= sum(item.weight for item in forgotten)

    def spans(self, generation_id: str) -> list[Span]:
        """What is remembered of a generation, in the order in which it ended."""
        return list(self._spans.get(generation_id, ()))
