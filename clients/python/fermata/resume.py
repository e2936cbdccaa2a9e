"""The decisions of reading on after an interruption (R4, R16, R18): pure, shared by the sync and the async client.

`Reading` is what a reader has of one generation and what it asks for next; `Recovery` says whether and when to try
again; `candidates` says where. Knows neither channels nor clocks nor threads: times are arguments.
"""

from __future__ import annotations

import enum
import random
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fermata.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    FermataError,
    Internal,
    LogDiverged,
    NeedFrom,
    NoOrchestrator,
    Overloaded,
    OwnerChanged,
    SlowReader,
    Unavailable,
)
from fermata.events import Choice, Event, Finished, Generation, Heartbeat, Started, Tokens, TopLogprobs
from fermata.running_hash import hash_ids

SILENCE = 3.0
"""Seconds without any message after which a link is dead; servers speak every second (R7)."""

DIAL_TIMEOUT = 1.0
"""Seconds that an endpoint has to answer a dial."""

GIVE_UP_AFTER = 60.0
"""Seconds of trouble without progress after which the reader is told."""

FIRST_BACKOFF, LONGEST_BACKOFF = 0.05, 1.0
"""Seconds between attempts: doubling from the first to the longest, each scaled by a random factor of 0.5 to 1."""


@dataclass(frozen=True, slots=True)
class ChoiceCursor:
    """How far a reader has come in one choice; an empty hash skips the comparison."""

    choice: int
    count: int
    running_hash: bytes


@dataclass(frozen=True, slots=True)
class ChoiceTail:
    """Ids that the log lost and the reader hands back."""

    choice: int
    first_offset: int
    token_ids: Sequence[int]


class ChoiceReading:
    """What a reader has of one choice.

    Attributes:
        base: count at which this reading began; tokens before it are not here.
        token_ids: the ids from `base` on, four bytes each.
        running_hash: over all tokens so far; None when `base` was given without ids and nothing has come since.
        finished: how it ended, or None.
    """

    __slots__ = ("base", "finished", "logprobs", "pieces", "running_hash", "token_ids", "top_logprobs")

    def __init__(self, base: int = 0, token_ids: Iterable[int] = ()) -> None:
        self.base = base
        self.token_ids = array("I", token_ids)
        self.running_hash: bytes | None = None if base else hash_ids(self.token_ids)
        self.pieces: list[str] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[TopLogprobs] = []
        self.finished: Finished | None = None

    @property
    def count(self) -> int:
        """Number of output tokens that the reader has seen."""
        return self.base + len(self.token_ids)

    @property
    def text(self) -> str:
        """Text since the reading began."""
        return "".join(self.pieces)


class Reading:
    """What a reader has of one generation.

    Attributes:
        generation_id: empty until it is known.
        session_id: empty until it is known.
        started: the newest `Started`, or None.
        endpoints: HOST:PORT of tokenizers that can resume it, the last speaker first.
        final_only: whether no tokens are expected; None when that is not known.
    """

    def __init__(
        self,
        generation_id: str = "",
        *,
        final_only: bool | None = None,
        cursors: Mapping[int, int] | None = None,
        token_ids: Mapping[int, Iterable[int]] | None = None,
    ) -> None:
        """Begins a reading, empty or with what was seen before.

        Args:
            generation_id: the generation, when it exists already.
            final_only: see the class.
            cursors: counts of tokens that were seen, per choice; their ids are not known.
            token_ids: the ids of the tokens that were seen, per choice, from offset 0. With them the reading can
                check its hash and give back what the log lost.
        """
        self.generation_id = generation_id
        self.session_id = generation_id.partition(".")[0]
        self.started: Started | None = None
        self.endpoints: tuple[str, ...] = ()
        self.final_only = final_only
        self._choices = {choice: ChoiceReading(base=count) for choice, count in (cursors or {}).items()}
        self._choices |= {choice: ChoiceReading(token_ids=ids) for choice, ids in (token_ids or {}).items()}
        self._unfinished = -1  # unknown before the first Started
        self._missing: dict[int, int] = {}

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return self._unfinished == 0

    @property
    def n(self) -> int:
        """Number of choices as far as it is known; at least 1."""
        return self.started.n if self.started is not None else max(self._choices, default=0) + 1

    def choice(self, index: int) -> ChoiceReading:
        """What the reader has of a choice."""
        reading = self._choices.get(index)
        if reading is None:
            reading = self._choices[index] = ChoiceReading()
        return reading

    def take(self, event: Event | Heartbeat | None) -> Event | None:
        """Adds an event; returns it when the reader shall see it.

        Raises:
            LogDiverged: the running hash is not that of the reader's own tokens.
            Unavailable: the event does not continue what is here, so the stream must be resumed.
        """
        if type(event) is Tokens:
            return self._take_tokens(event)
        if type(event) is Started:
            return self._take_started(event)
        if type(event) is Finished:
            return self._take_finished(event)
        if type(event) is Heartbeat and event.endpoints:
            self.endpoints = event.endpoints
        return None

    def _take_tokens(self, tokens: Tokens) -> Tokens | None:
        reading = self.choice(tokens.choice)
        count = reading.base + len(reading.token_ids)
        if tokens.first_offset != count:
            if tokens.first_offset + len(tokens.token_ids) <= count:
                return None  # seen already
            raise Unavailable(f"choice {tokens.choice} is at {count}, the stream sent offset {tokens.first_offset}")
        if reading.running_hash is None:
            reading.running_hash = tokens.running_hash
        else:
            running_hash = hash_ids(tokens.token_ids, reading.running_hash)
            if running_hash != tokens.running_hash:
                raise _diverged(tokens.choice, count)
            reading.running_hash = running_hash
        reading.token_ids.extend(tokens.token_ids)
        reading.pieces.append(tokens.text)
        if tokens.logprobs:
            reading.logprobs.extend(tokens.logprobs)
            reading.top_logprobs.extend(tokens.top_logprobs)
        return tokens

    def _take_started(self, started: Started) -> Started | None:
        previous, self.started = self.started, started
        self.generation_id, self.session_id = started.generation_id, started.session_id
        self.endpoints = started.endpoints or self.endpoints
        self._missing.clear()
        if previous is None:
            self._unfinished = max(started.n, 1)
            return started
        moved = previous.fingerprint is not None and started.fingerprint != previous.fingerprint
        return started if moved else None

    def _take_finished(self, finished: Finished) -> Finished | None:
        reading = self.choice(finished.choice)
        if reading.finished is not None:
            return None
        if reading.count or (finished.count and self.final_only is False):
            if finished.count > reading.count:
                raise Unavailable(f"choice {finished.choice} is at {reading.count}, it ended at {finished.count}")
            expected = reading.running_hash or finished.running_hash
            if finished.count < reading.count or finished.running_hash != expected:
                raise _diverged(finished.choice, finished.count)
        reading.finished = finished
        reading.pieces.append(finished.text)
        self._unfinished -= 1
        return finished

    def need_from(self, error: NeedFrom) -> None:
        """Notes what the log lost, to be handed back at the next `Resume` (R16).

        Raises:
            NeedFrom: the reader has not kept these ids.
        """
        choice, count = int(error.metadata.get("choice", "0")), int(error.metadata.get("count", "0"))
        if not self.choice(choice).base <= count <= self.choice(choice).count:
            raise error
        self._missing[choice] = count

    def cursors(self) -> list[ChoiceCursor]:
        """What the reader has, per choice that it has anything of."""
        return [
            ChoiceCursor(index, reading.count, reading.running_hash or b"")
            for index, reading in sorted(self._choices.items())
            if reading.count
        ]

    def tails(self) -> list[ChoiceTail]:
        """What the log lost, as far as it was told."""
        return [
            ChoiceTail(index, count, self.choice(index).token_ids[count - self.choice(index).base :])
            for index, count in sorted(self._missing.items())
        ]

    def result(self) -> Generation:
        """What was read so far.

        Raises:
            RuntimeError: nothing has come yet.
        """
        if self.started is None:
            raise RuntimeError("the generation has not started")
        return Generation(self.started, tuple(self._result(index) for index in range(max(self.started.n, 1))))

    def _result(self, index: int) -> Choice:
        reading = self.choice(index)
        return Choice(
            index=index,
            text=reading.text,
            token_ids=tuple(reading.token_ids),
            finished=reading.finished,
            logprobs=tuple(reading.logprobs),
            top_logprobs=tuple(reading.top_logprobs),
        )


def _diverged(choice: int, count: int) -> LogDiverged:
    return LogDiverged(
        f"the tokens of choice {choice} that were read are not those of the log",
        metadata={"choice": str(choice), "count": str(count)},
    )


class Where(enum.Enum):
    """On which link to try again."""

    SAME_LINK = enum.auto()
    OTHER_LINK = enum.auto()


class Remedy(NamedTuple):
    """Try again, after `delay` seconds."""

    delay: float
    where: Where


class Recovery:
    """Whether, when and on which link to try again: one per stream or call."""

    def __init__(
        self, give_up_after: float = GIVE_UP_AFTER, uniform: Callable[[float, float], float] = random.uniform
    ) -> None:
        self._give_up_after = give_up_after
        self._uniform = uniform
        self._attempts = 0
        self._trouble_since: float | None = None

    @property
    def troubled(self) -> bool:
        """Whether something failed since the last progress."""
        return self._trouble_since is not None

    def progress(self) -> None:
        """Something new was read: forgets the troubles before it."""
        self._attempts = 0
        self._trouble_since = None

    def remedy(self, error: FermataError, *, started: bool, now: float) -> Remedy:
        """What to do about a failure.

        Args:
            error: what failed.
            started: whether the generation is known to exist, so that it is resumed and not asked for again.
            now: seconds of a monotonic clock.

        Raises:
            FermataError: the error itself, when trying again makes no sense or was done for long enough.
        """
        where = _where(error, started)
        if where is None:
            raise error
        if self._trouble_since is None:
            self._trouble_since = now
        delay = self._backoff()
        if error.retry_delay is not None:
            delay = max(delay, error.retry_delay)
        if now + delay - self._trouble_since > self._give_up_after:
            error.add_note(f"gave up after {self._give_up_after:g} s")
            raise error
        self._attempts += 1
        return Remedy(delay, where)

    def _backoff(self) -> float:
        if self._attempts == 0:
            return 0.0
        # The exponent is bounded: 2.0 ** 1024 overflows.
        longest = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0 ** min(self._attempts - 1, 16))
        return longest * self._uniform(0.5, 1.0)


def _where(error: FermataError, started: bool) -> Where | None:
    """The table of `RESUME.md`; None: not to be tried again."""
    if isinstance(error, DeadlineExceeded):
        return None
    broken_link = not error.reason and isinstance(error, Unavailable | Cancelled | Internal)
    if broken_link or isinstance(error, Draining | NoOrchestrator):
        return Where.OTHER_LINK
    if isinstance(error, Unavailable | OwnerChanged | SlowReader | NeedFrom):
        return Where.SAME_LINK
    # A generation that exists is not new load, which the caller should hear about.
    if isinstance(error, Overloaded) and started:
        return Where.SAME_LINK
    return None


class Endpoint(NamedTuple):
    """A place to dial. Two lanes to one address are two connections, which a shared port may give to two processes."""

    address: str
    lane: int


def candidates(home: str, known: Sequence[str], failed: str) -> list[Endpoint]:
    """Where to go on, in the order of dialling, two at a time.

    Other tokenizers come first, then the address that the client was given (twice: behind a shared port may be
    another process), at last the one that failed and the one that spoke last, which are one process as a rule.

    Args:
        home: address that the client was given.
        known: endpoints as told by the server, the speaker first.
        failed: address of the link that failed; empty for none.
    """
    others = [address for address in known[1:] if address not in (failed, home)]
    last = [address for address in (known[0] if known else "", failed) if address and address != home]
    order = [*others, home]
    endpoints = [Endpoint(address, 0) for address in dict.fromkeys(order)] + [Endpoint(home, 1)]
    return endpoints + [Endpoint(address, 0) for address in dict.fromkeys(last) if address not in order]
