"""Keeps one reader attached to whoever owns its generation, through broken links, moves, lost log ends (R8, R9, R16).

A state machine without tasks of its own: links, ends and the ticker drive it. Knows nothing of tokens or text; what a
reader has is asked of it when it attaches again.
"""

from __future__ import annotations

import time
from typing import Protocol

from services.common.errors import (
    Draining,
    FermataError,
    NeedFrom,
    NoOrchestrator,
    NoShard,
    Overloaded,
    OwnerChanged,
    OwnerElsewhere,
    SessionStoreUnavailable,
    SlowReader,
)
from services.orchestrator.v1 import orchestrator_pb2
from services.tokenizer.link import Link, LinkReader
from services.tokenizer.route import PAUSE, Route

GIVE_UP_AFTER = 10.0
"""Seconds without an orchestrator after which a reader is told so."""
_MOST_HAND_BACKS = 20
"""Answers of NEED_FROM in a row; a log that shrinks oftener than it has choices is no log."""

_MOVED = (OwnerChanged, SlowReader)
_PASSING = (SessionStoreUnavailable, NoShard, Overloaded)
"""Conditions that end by themselves; a stream that runs waits for that, a new one is told at once."""


class Links(Protocol):
    """Where links come from."""

    def link(self, address: str) -> Link:
        """The living link to an orchestrator, or a new one."""
        ...


class AttachedReader(LinkReader, Protocol):
    """A reader, as the attachment needs it."""

    def attach_message(self) -> orchestrator_pb2.Attach:
        """What is to be read, and from where on; with what was asked to be handed back."""
        ...

    def hand_back(self, choice: int, count: int) -> bool:
        """Notes that the log has only `count` tokens of a choice; False when the reader lacks those behind."""
        ...

    def fail(self, error: FermataError) -> None:
        """The reader is ended."""
        ...


class Attachment:
    """The bond between one reader and the orchestrators."""

    def __init__(self, links: Links, reader: AttachedReader, route: Route) -> None:
        self._links = links
        self._reader = reader
        self._route = route
        self._link: Link | None = None
        self._number = 0
        self._was_attached = False
        self._outage_began: float | None = time.monotonic()
        self._retry_at: float | None = None
        self._hand_backs = 0
        self._reason: FermataError | None = None
        self._over = False

    def attach(self) -> None:
        """Attaches where the route points."""
        self._retry_at = None
        if not self._route.address:
            self._again(self._route.failed())
            return
        self._link = self._links.link(self._route.address)
        self._number = self._link.attach(self._reader, self._reader.attach_message())

    def leave(self) -> None:
        """The reader is gone, or got all."""
        self._over = True
        if self._link is not None:
            self._link.detach(self._number)
            self._link = None

    def trace(self, generation_id: str) -> None:
        """Has the steps of a generation handed to the collector of spans."""
        if self._link is not None:
            self._link.trace(generation_id)

    def on_attached(self) -> None:
        """The orchestrator serves the reader."""
        self._was_attached = True
        self._outage_began = self._reason = None
        self._hand_backs = 0
        self._route.succeeded()

    def on_broken(self, *, leaving: bool) -> None:
        """The link is gone."""
        self._link = None
        self._again(self._route.failed(leaving=leaving))

    def on_ended(self, error: FermataError) -> None:
        """The orchestrator ended the reader: goes where it should, or tells the reader why not."""
        leaving = self._link is not None and self._link.draining
        self._link = None
        if isinstance(error, OwnerElsewhere) and error.metadata.get("address"):
            self._again(self._route.redirected(error.metadata["address"]))
        elif isinstance(error, NeedFrom):
            self._hand_back(error)
        elif isinstance(error, Draining):
            self._again(self._route.failed(leaving=True))
        elif isinstance(error, _MOVED):
            self._again(self._route.failed(leaving=leaving))
        elif isinstance(error, _PASSING) and self._was_attached:
            self._reason = error
            self._again(max(PAUSE, self._route.failed()))
        else:
            self._reader.fail(error)

    def tick(self, now: float) -> None:
        """Called several times per second (`now` as of time.monotonic): retries that are due, and giving up."""
        if self._outage_began is None or self._over:
            return
        if now - self._outage_began > GIVE_UP_AFTER:
            self._reader.fail(self._reason or NoOrchestrator("no orchestrator answers; retry", retry_delay=1.0))
        elif self._retry_at is not None and now >= self._retry_at:
            self.attach()

    def _hand_back(self, error: NeedFrom) -> None:
        """The log is shorter than what was delivered: attaches once more with the tokens it lacks."""
        self._hand_backs += 1
        choice, count = int(error.metadata.get("choice", -1)), int(error.metadata.get("count", -1))
        if self._hand_backs > _MOST_HAND_BACKS or not self._reader.hand_back(choice, count):
            self._reader.fail(error)
        else:
            self._again(0.0)

    def _again(self, delay: float) -> None:
        if self._over:
            return
        now = time.monotonic()
        if self._outage_began is None:
            self._outage_began = now
        if delay > 0:
            self._retry_at = now + delay
        else:
            self.attach()
