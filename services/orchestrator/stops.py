"""Stop strings over bytes, as they grow token by token (R3).

Pure. Knows bytes only: neither ids, nor logs, nor readers. Each stop string is a Knuth-Morris-Pratt automaton, so a
match may begin and end in the middle of tokens, and what a token might still become is known after each byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """A stop string was completed.

    Attributes:
        stop: index of the stop string in the list.
        length: its bytes.
        rest: bytes fed with the same piece that follow it.
    """

    stop: int
    length: int
    rest: int


class StopMatcher:
    """Looks for the first of several byte strings to be completed in a growing sequence of bytes.

    Where two are completed by the same byte, the longer one counts.
    """

    def __init__(self, stops: Sequence[bytes]) -> None:
        self._stops = stops
        self._failures = [_failure_function(stop) for stop in stops]
        self._matched = [0] * len(stops)

    @property
    def held(self) -> int:
        """Bytes at the end of what was fed that may still become a stop string."""
        return max(self._matched, default=0)

    def feed(self, piece: bytes) -> StopMatch | None:
        """Adds bytes. After a match the matcher must not be fed again."""
        if not self._stops:
            return None
        for position, byte in enumerate(piece):
            completed = [index for index in range(len(self._stops)) if self._step(index, byte)]
            if completed:
                index = max(completed, key=lambda candidate: len(self._stops[candidate]))
                return StopMatch(index, len(self._stops[index]), len(piece) - position - 1)
        return None

    def _step(self, index: int, byte: int) -> bool:
        """Moves one automaton by one byte; True when its string is complete."""
        stop, failure, matched = self._stops[index], self._failures[index], self._matched[index]
        while matched and stop[matched] != byte:
            matched = failure[matched - 1]
        if stop[matched] == byte:
            matched += 1
        self._matched[index] = matched
        return matched == len(stop)


def _failure_function(pattern: bytes) -> list[int]:
    """Length of the longest proper border of each prefix (Knuth, Morris, Pratt 1977)."""
    failure = [0] * len(pattern)
    length = 0
    for position in range(1, len(pattern)):
        while length and pattern[length] != pattern[position]:
            length = failure[length - 1]
        if pattern[length] == pattern[position]:
            length += 1
        failure[position] = length
    return failure
