"""The moments of many tokens as rows of numbers, and the parts between them, all at once.

What `timings.between` says of two tokens, said of a whole row of them at a tenth of the cost; a test holds it to that.
Pure.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.common.timings import Delivery, Parts, StepMoments, TokenMoments

Matrix = NDArray[np.int64]

_FIELDS = (
    *Delivery._fields,  # in the place of `written` is first of all when the reader began to take the events before
    *("wrote_to", "received", "clock", "visible", "sent", "shard"),
    *(f"step_{name}" for name in StepMoments._fields[1:]),
)
WIDTH = len(_FIELDS)
"""Numbers of a row."""
_PLACE = {name: place for place, name in enumerate(_FIELDS)}
_NO_STEP = (0,) * (len(StepMoments._fields) - 1)
_NO_SHARD = -1
_shards: list[str] = []
"""Every shard that this process has heard of; rows have the place."""


class NotedMoments(NamedTuple):
    """The moments of tokens that came together, and their half of a row: it is made once for all of them."""

    moments: TokenMoments
    half_row: tuple[int, ...]


def note(moments: TokenMoments) -> NotedMoments:
    """Makes the half of a row."""
    step = moments.step
    if step is None:
        shard, known = _NO_SHARD, _NO_STEP
    else:
        if step.shard not in _shards:
            _shards.append(step.shard)
        shard, known = _shards.index(step.shard), step[1:]
    return NotedMoments(moments, (moments.received, moments.clock, moments.visible, moments.sent, shard, *known))


def shard_at(place: int) -> str:
    """The process id of a shard by its number in a row; empty when none is known."""
    return _shards[place] if place >= 0 else ""


Occasion = tuple[Sequence[NotedMoments], int, int, int, int, int]
"""Tokens of one choice that left together: their moments; when the event with them was begun, filled and handed on;
from when to when the reader took the events before."""


def delivery_of(noted: NotedMoments, occasion: Occasion) -> Delivery:
    """How one of the tokens of an occasion was told."""
    _, began, filled, departed, wrote_from, wrote_to = occasion
    written = min(began, wrote_to) - max(noted.half_row[0], wrote_from)
    return Delivery(began, filled, departed, max(0, written))


def rows_of(occasions: Iterable[Occasion]) -> Matrix:
    """The rows of all tokens, in their order [tokens, WIDTH]."""
    numbers = array("q")
    for occasion in occasions:
        for noted in occasion[0]:
            numbers.extend(occasion[1:] + noted.half_row)
    rows: Matrix = np.array(numbers, dtype=np.int64).reshape(-1, WIDTH)
    written = np.minimum(column(rows, "began"), column(rows, "wrote_to"))
    written -= np.maximum(column(rows, "received"), column(rows, "written"))
    rows[:, _PLACE["written"]] = np.maximum(written, 0)
    return rows


def column(rows: Matrix, name: str) -> Matrix:
    """One number of each row: a name of `Delivery`, of `TokenMoments`, `shard`, or `step_` and one of `StepMoments`."""
    return rows[:, _PLACE[name]]


_DRAWN = "step_started + step_schedule + step_forward + step_sample"
_OF_TOKENIZER = {
    "queue": ("began - received - written", "began - received - written"),
    "detokenize": ("filled - began", "filled - began"),
    "write": ("written + departed - filled", "written + departed - filled"),
}
_OF_LINK = {
    "relay": ("sent - visible", "sent - visible"),
    "hop": ("received - sent", "received - sent"),
}
_OF_SHARD = {
    "wait": ("step_started", "step_departed"),
    "schedule": ("step_schedule", ""),
    "forward": ("step_forward", ""),
    "sample": ("step_sample", ""),
    "publish": (f"step_sent - {_DRAWN.replace('+', '-')}", "step_sent - step_departed"),
    "shard_hop": ("step_arrived - step_sent", "step_arrived - step_sent"),
    "commit": ("visible - step_arrived", "visible - step_arrived"),
}
"""Parts as sums over a token's row, from which the sum over the row before is taken: each is linear in the moments."""


def _factors(parts: Mapping[str, tuple[str, str]]) -> tuple[Matrix, Matrix]:
    """The sums as matrices [WIDTH, fields of `Parts`], for a row and for the one before it."""
    factors = np.zeros((2, WIDTH, len(Parts._fields)), dtype=np.int64)
    for name, sums in parts.items():
        for matrix, text in zip(factors, sums, strict=True):
            for term in text.replace("- ", "-").replace("+ ", "").split():
                sign = -1 if term.startswith("-") else 1
                matrix[_PLACE[term.removeprefix("-")], Parts._fields.index(name)] = sign
    return factors[0], factors[1]


_ALWAYS, _ON_SAME_LINK, _ON_SAME_SHARD = _factors(_OF_TOKENIZER), _factors(_OF_LINK), _factors(_OF_SHARD)
_ALL = tuple(sum(matrices) for matrices in zip(_ALWAYS, _ON_SAME_LINK, _ON_SAME_SHARD, strict=True))


def parts_between(rows: Matrix) -> Matrix:
    """The parts of each token after the first, against the one before it [tokens - 1, fields of `Parts`]."""
    now, then = rows[1:], rows[:-1]
    same_link = column(now, "clock") == column(then, "clock")
    same_shard = same_link & (column(now, "shard") == column(then, "shard")) & (column(now, "shard") != _NO_SHARD)
    if same_shard.all():
        found: Matrix = now @ _ALL[0] - then @ _ALL[1]
    else:
        found = now @ _ALWAYS[0] - then @ _ALWAYS[1]
        found += same_link[:, None] * (now @ _ON_SAME_LINK[0] - then @ _ON_SAME_LINK[1])
        found += same_shard[:, None] * (now @ _ON_SAME_SHARD[0] - then @ _ON_SAME_SHARD[1])
    found[:, 0] = column(now, "departed") - column(then, "departed")
    found[:, -1] = found[:, 0] - found[:, 1:-1].sum(axis=1)
    return found
