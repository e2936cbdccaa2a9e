"""What a reader has of one choice: its ids, its text, and how far it was told (R2, R4, R16).

Knows neither messages nor streams. Ids are kept for the whole call, four bytes each: they are what is handed back when
a log turns out to be shorter than what was delivered.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from fermata.running_hash import EMPTY_HASH
from services.common.errors import InternalError
from services.common.vocabulary import IncrementalText, Vocabulary
from services.tokenizer.timing_rows import NotedMoments


class TopEntries(NamedTuple):
    """The most probable ids at one offset with their raw log-probabilities."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]


class Arrived(NamedTuple):
    """Tokens of one choice, as one message brings them.

    Attributes:
        first_offset: of the first id.
        token_ids: the ids.
        held_bytes: bytes at the end that may still become a stop string.
        running_hash: over all ids of the choice up to the last of these.
        durable_count: tokens of the choice that the session store has acknowledged.
        logprobs: of each id; empty when nobody asked.
        top_logprobs: of each id; empty when nobody asked.
        moments: of each id; empty when nobody looks.
    """

    first_offset: int
    token_ids: Sequence[int]
    held_bytes: int
    running_hash: bytes
    durable_count: int
    logprobs: Sequence[float] = ()
    top_logprobs: Sequence[TopEntries] = ()
    moments: Sequence[NotedMoments] = ()


class Delta(NamedTuple):
    """What was not told yet; all of it at once, however many messages brought it."""

    first_offset: int
    token_ids: array[int]
    text: str
    logprobs: list[float]
    top_logprobs: list[TopEntries]
    moments: list[NotedMoments]


class ChoiceReading:
    """One choice as one reader sees it.

    Attributes:
        choice: its index.
        running_hash: over all ids up to `count`; empty when the reader gave none.
        durable_count: tokens that the session store has acknowledged.
        finished: its end was told.
    """

    __slots__ = (
        "_first",
        "_held_bytes",
        "_ids",
        "_logprobs",
        "_moments",
        "_text",
        "_told",
        "_tops",
        "choice",
        "durable_count",
        "finished",
        "running_hash",
    )

    def __init__(
        self, choice: int, first_offset: int = 0, held_ids: Sequence[int] = (), running_hash: bytes = EMPTY_HASH
    ) -> None:
        """Begins behind `held_ids`, the ids from `first_offset` on that the reader has."""
        self.choice = choice
        self.running_hash = running_hash
        self.durable_count = 0
        self.finished = False
        self._first = first_offset
        self._ids = array("I", held_ids)
        self._told = len(self._ids)
        self._text: IncrementalText | None = None
        self._held_bytes = 0
        self._logprobs: list[float] = []
        self._tops: list[TopEntries] = []
        self._moments: list[NotedMoments] = []

    @property
    def count(self) -> int:
        """Tokens of the choice that are here: the cursor."""
        return self._first + len(self._ids)

    @property
    def told_offset(self) -> int:
        """Tokens of the choice that were told, here or before."""
        return self._first + self._told

    @property
    def begun(self) -> bool:
        """It is known what the text before the cursor does not show yet."""
        return self._text is not None

    @property
    def has_news(self) -> bool:
        """There are tokens that were not told."""
        return self._told < len(self._ids)

    def begin(self, pending: bytes) -> None:
        """Starts the text behind the cursor; `pending` are bytes before it that are not shown yet."""
        self._text = IncrementalText(pending)

    def accept(self, arrived: Arrived) -> bool:
        """Takes in tokens; what is here already is dropped by its count.

        Returns:
            True when there is something new.

        Raises:
            InternalError: tokens are missing before these.
        """
        self.durable_count = max(self.durable_count, arrived.durable_count)
        token_ids = arrived.token_ids
        known = self._first + len(self._ids) - arrived.first_offset
        if known < 0:
            last = arrived.first_offset - 1
            raise InternalError(f"choice {self.choice}: tokens {self.count} to {last} are missing")
        if known >= len(token_ids):
            return False
        self._ids.extend(token_ids[known:] if known else token_ids)
        self._held_bytes = arrived.held_bytes
        self.running_hash = arrived.running_hash
        if arrived.logprobs:
            self._logprobs.extend(arrived.logprobs[known:])
            self._tops.extend(arrived.top_logprobs[known:])
        if arrived.moments:
            self._moments.extend(arrived.moments[known:])
        return True

    def take(self, vocabulary: Vocabulary) -> Delta:
        """What was not told yet, with the text that it adds."""
        told = self._told
        token_ids = self._ids[told:]
        self._told = told + len(token_ids)
        table = vocabulary.table
        if len(token_ids) == 1 and token_ids[0] < len(table):  # almost always: no loop for one token
            said = table[token_ids[0]]
        else:
            said = vocabulary.bytes_of(token_ids)
        text = (self._text or self._begun_text()).extend(said, self._held_bytes)
        delta = Delta(self._first + told, token_ids, text, self._logprobs, self._tops, self._moments)
        if self._logprobs:
            self._logprobs, self._tops = [], []
        if self._moments:
            self._moments = []
        return delta

    def finish(self, cut_bytes: int) -> str:
        """The end of the choice: the rest of the text, without the last `cut_bytes` bytes."""
        self.finished = True
        return self._begun_text().finish(cut_bytes)

    def ids_from(self, offset: int) -> array[int] | None:
        """The ids from `offset` to the cursor; None when some of them are not here."""
        return self._ids[offset - self._first :] if self._first <= offset <= self.count else None

    def skip_one(self) -> None:
        """The planted bug `resume_off_by_one`: takes a token for read that was not."""
        self._first += 1
        self.running_hash = b""

    def _begun_text(self) -> IncrementalText:
        if self._text is None:
            self._text = IncrementalText()
        return self._text
