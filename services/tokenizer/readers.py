"""All readers of this process, and the one clock that they share (R5, R7, R19).

A stream has no timer of its own: several times per second the ticker looks at all of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from services.common.errors import FermataError
from services.tokenizer.orchestrators import Orchestrators
from services.tokenizer.reader import Face, Reader, Target
from services.tokenizer.requests import placement_key
from services.tokenizer.route import Route

log = logging.getLogger(__name__)

TICK_INTERVAL = 0.1
"""Seconds between looks; heartbeats, retries and acknowledgements are late by at most that."""


class Readers:
    """The readers.

    Attributes:
        face: what they all say of this process.
    """

    def __init__(self, orchestrators: Orchestrators, face: Face) -> None:
        self.face = face
        self._orchestrators = orchestrators
        self._readers: set[Reader] = set()

    def __len__(self) -> int:
        return len(self._readers)

    def open(self, target: Target, *, first: str = "", on_slow: Callable[[FermataError], None]) -> Reader:
        """A new reader, which attaches when it is entered.

        Args:
            target: what is to be read.
            first: the address that is asked first; empty takes the one that rendezvous hashing prefers.
            on_slow: see `Reader`.
        """
        route = Route(self._orchestrators.directory, placement_key(target.name), first)
        reader = Reader(self.face, self._orchestrators, route, target, on_slow=on_slow, on_left=self._readers.discard)
        self._readers.add(reader)
        return reader

    def drain(self) -> None:
        """Tells all streams that this process is about to leave."""
        self.face.draining = True
        for reader in self._readers:
            reader.beat()

    def end_all(self, error: FermataError) -> None:
        """Ends those that are still there."""
        for reader in list(self._readers):
            reader.fail(error)

    async def tick(self) -> None:
        """Keeps time for readers and links, until cancelled."""
        while True:
            await asyncio.sleep(TICK_INTERVAL)
            now = time.monotonic()
            try:
                self._orchestrators.tick(now)
                for reader in list(self._readers):
                    reader.tick(now)
            except Exception:  # the clock of all streams must not stop
                log.exception("ticker")
