"""Holding a reader's cursors against a generation's log (R4, R15, R16).

Pure: knows logs and counts; neither streams nor stores.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

from services.common.errors import CursorOutOfRange, FieldViolation, InvalidRequest, LogDiverged, NeedFrom
from services.common.types import Cursor, Tail
from services.orchestrator.generation import Generation
from services.orchestrator.sequence import Sequence


class Matched(NamedTuple):
    """Where a reader stands.

    Attributes:
        counts: by choice, the tokens that it has.
        grown: choices whose log was extended by its tails.
    """

    counts: list[int]
    grown: list[Sequence]


def match_cursors(generation: Generation, cursors: Items[Cursor], tails: Items[Tail]) -> Matched:
    """Finds where a reader stands, and extends the log by what it alone still has.

    Raises:
        InvalidRequest: a cursor names a choice that does not exist.
        CursorOutOfRange: a cursor lies behind the end of a choice that has ended.
        NeedFrom: the log is shorter than a cursor, and no tail was given.
        LogDiverged: the reader has other tokens than the log.
    """
    counts = [0] * len(generation.sequences)
    missing: list[tuple[Sequence, list[int]]] = []
    for index, cursor in enumerate(cursors):
        if cursor.choice >= len(counts):
            violation = FieldViolation(f"cursors[{index}].choice", f"must be below {len(counts)}")
            raise InvalidRequest(f"the generation has no choice {cursor.choice}", violations=[violation])
        sequence = generation.sequences[cursor.choice]
        if cursor.count > sequence.count:
            missing.append((sequence, _missing_ids(generation, sequence, cursor, tails)))
        elif cursor.running_hash and sequence.running_hash(cursor.count) != cursor.running_hash:
            raise _diverged(sequence)
        counts[cursor.choice] = cursor.count
    # Only now, when every cursor fits, is anything changed.
    for sequence, token_ids in missing:
        for token_id in token_ids:
            sequence.append(token_id)
    return Matched(counts, [sequence for sequence, _ in missing])


def _missing_ids(generation: Generation, sequence: Sequence, cursor: Cursor, tails: Items[Tail]) -> list[int]:
    """What a log lacks that is shorter than a reader's cursor (R16)."""
    facts = {"choice": str(cursor.choice), "count": str(sequence.count)}
    if sequence.ending is not None or not generation.active:
        raise CursorOutOfRange(f"choice {cursor.choice} ended after {sequence.count} tokens", metadata=facts)
    tail = next((tail for tail in tails if tail.choice == cursor.choice), None)
    if tail is None:
        message = f"the log has {sequence.count} tokens of choice {cursor.choice}; hand back those from there on"
        raise NeedFrom(message, metadata=facts)
    missing = sequence.accepts_tail(tail.first_offset, tail.token_ids, cursor.count, cursor.running_hash)
    if missing is None:
        raise _diverged(sequence)
    if not sequence.takes(missing):
        raise CursorOutOfRange(f"choice {cursor.choice} ends before {cursor.count} tokens", metadata=facts)
    return missing


def _diverged(sequence: Sequence) -> LogDiverged:
    return LogDiverged(
        f"the log of choice {sequence.choice} has other tokens; read it again from the start",
        metadata={"choice": str(sequence.choice), "count": str(sequence.count)},
    )
