"""The tokens of one choice as one reader was told them, packed, and the spans that they become.

Knows moments and spans; neither streams nor who collects them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

from services.common import attributes as names
from services.common.timings import CallMoments, Parts, Told, first
from services.common.tracing import Attribute, Span, TraceContext, epoch_offset, step_context
from services.tokenizer.timing_rows import (
    WIDTH,
    Matrix,
    Occasion,
    column,
    delivery_of,
    parts_between,
    rows_of,
    shard_at,
)

MOST_TOKENS = 1024
"""Tokens of one span; a longer answer has several."""


class DecodeRecord:
    """The tokens of a choice, from the first that a reader is told on.

    Tokens are put into `waiting` as they are told, and worked out many at a time.
    """

    __slots__ = (
        *("_began_ns", "_call", "_choice", "_count", "_first_offset", "_last", "_parts", "_rows"),
        *("first_ns", "waiting"),
    )

    def __init__(self, choice: int, first_offset: int, call: CallMoments) -> None:
        """Begins with the call, against which the first token's parts are.

        Attributes:
            waiting: tokens that were told and are not worked out.
            first_ns: when the first token left, on this process's monotonic clock; None until it is worked out.
        """
        self.first_ns: int | None = None
        self._call = call
        self._choice = choice
        self._first_offset = first_offset
        self._began_ns = call.arrived
        self.waiting: list[Occasion] = []
        self._last: Matrix = np.empty((0, WIDTH), dtype=np.int64)
        self._rows: list[Matrix] = []
        self._parts: list[Matrix] = []
        self._count = 0

    @property
    def count(self) -> int:
        """Tokens that are worked out and not yet in a span."""
        return self._count

    def settle(self) -> Matrix:
        """Works out the tokens since the last time: their parts [tokens, fields of `Parts`]."""
        rows = np.concatenate((self._last, rows_of(self.waiting)))
        if self.first_ns is None and len(rows):
            occasion = next(item for item in self.waiting if item[0])  # the first that anything is known of
            noted = occasion[0][0]
            begin = first(Told(noted.moments, delivery_of(noted, occasion)), self._call)
            parts = np.concatenate((np.array([begin], dtype=np.int64), parts_between(rows)))
            fresh = rows
            self.first_ns = int(column(rows, "departed")[0])
        else:
            parts, fresh = parts_between(rows), rows[1:]
        self.waiting.clear()
        self._last = rows[-1:]
        self._rows.append(fresh)
        self._parts.append(parts)
        self._count += len(fresh)
        return parts

    def span(self, generation_id: str, parent: TraceContext, link: TraceContext | None) -> Span:
        """All tokens that are worked out, as one span. There must be at least one.

        Args:
            generation_id: whose.
            parent: the span of the generation.
            link: the span of the call that reads, when it is of another trace.
        """
        rows = np.concatenate(self._rows)
        departed, places = column(rows, "departed"), column(rows, "shard").tolist()
        shards = [place for place in dict.fromkeys(places) if place >= 0]
        attributes: dict[str, Attribute] = {
            names.GENERATION_ID: generation_id,
            names.CHOICE: self._choice,
            names.FIRST_OFFSET: self._first_offset,
            names.SHARDS: [shard_at(place) for place in shards],
            names.TOKEN_SHARD: array("b", [shards.index(place) if place >= 0 else -1 for place in places]),
            names.TOKEN_STEP: _array(column(rows, "step_number")),
            names.TOKEN_DEPARTED: _array((departed - self._began_ns) // 1000),
        }
        microseconds = np.concatenate(self._parts) // 1000
        for place in np.flatnonzero(microseconds.any(axis=0)).tolist():
            if place:
                attributes[names.part(Parts._fields[place])] = _array(microseconds[:, place])
        offset = epoch_offset()
        return Span(
            "decode",
            parent.child(),
            parent.span_id,
            self._began_ns + offset,
            int(departed[-1]) + offset,
            attributes=attributes,
            links=(link,) if link is not None else (),
        )

    def token_spans(self, decode: Span) -> Iterator[Span]:
        """A span for each token, below the one that `span` made, each with a link to the step that drew it."""
        began, offset = self._began_ns, epoch_offset()
        rows = np.concatenate(self._rows)
        microseconds = (np.concatenate(self._parts) // 1000).tolist()
        told = zip(*(column(rows, name).tolist() for name in ("departed", "shard", "step_number")), strict=True)
        for place, ((departed, at, step), parts) in enumerate(zip(told, microseconds, strict=True)):
            attributes: dict[str, Attribute] = {names.TOKEN_OFFSET: self._first_offset + place}
            attributes |= {
                names.part(part): value for part, value in zip(Parts._fields[1:], parts[1:], strict=True) if value
            }
            shard = shard_at(at)
            yield Span(
                "token",
                decode.context.child(),
                decode.context.span_id,
                began + offset,
                departed + offset,
                attributes=attributes,
                links=(step_context(shard, step),) if shard else (),
            )
            began = departed

    def clear(self) -> None:
        """What is in spans is needed no more; the next span begins where the last token left."""
        self._began_ns = int(column(self._last, "departed")[0])
        self._first_offset += self._count
        self._rows.clear()
        self._parts.clear()
        self._count = 0


def _array(numbers: Matrix) -> array[int]:
    """Numbers without the rest of the matrix that they are in."""
    return array("q", numbers.tobytes())
