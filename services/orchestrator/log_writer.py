"""Writes logs to the session store beside the step loop: grouped, one call in flight, never awaited by a step (R15).

Knows what is not stored yet and when to write it; what a refusal means for a generation is its listener's business.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from services.common import failpoints
from services.common.errors import SessionStoreUnavailable
from services.common.types import pack_ids
from services.orchestrator.generation import Generation
from services.orchestrator.observer import Observer
from services.orchestrator.sequence import Sequence
from services.orchestrator.session_records import Append, Finish, Operation, Park, Result
from services.orchestrator.sessions import SessionStore

log = logging.getLogger(__name__)

APPEND_INTERVAL = 0.02
"""Seconds from one write to the next, for which tokens may wait for others (R15)."""
APPEND_TOKENS = 8
"""Tokens of one choice that are written without waiting (R15)."""
_FIRST_RETRY, _LAST_RETRY = 0.1, 1.0

_Work = tuple[Generation, Sequence | None, Operation]
"""An operation with what it belongs to; a park belongs to no choice."""


class WriteListener(Protocol):
    """Who is told what the store said. Called on the event loop; must not block."""

    def on_stored(self, generation: Generation) -> None:
        """More of the generation is durable."""

    def on_refused(self, generation: Generation, sequence: Sequence | None, result: Result) -> None:
        """The store has another owner, another log, or nothing."""

    def on_cut_off(self) -> None:
        """The store went out of reach."""


class LogWriter:
    """The one writer of this process.

    Attributes:
        cut_off: the last write found the store out of reach.
    """

    def __init__(self, store: SessionStore, listener: WriteListener, observer: Observer) -> None:
        self.cut_off = False
        self._store = store
        self._listener = listener
        self._observer = observer
        self._dirty: dict[int, Generation] = {}
        self._parking: dict[int, Generation] = {}
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()
        self._flushed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def mark(self, generation: Generation, sequence: Sequence) -> None:
        """Notes that a choice grew or ended."""
        self._dirty[id(generation)] = generation
        self._wake.set()
        unsaved = sequence.count - sequence.durable_count
        if unsaved >= APPEND_TOKENS or sequence.ending is not None or generation.spec.committed:
            self._urgent.set()

    def park(self, generation: Generation) -> None:
        """Notes that the store shall be told that a generation waits for a reader, after the rest of its log."""
        self._parking[id(generation)] = generation
        self._wake.set()
        self._urgent.set()

    async def settle(self, done: Callable[[], bool], seconds: float) -> bool:
        """Waits until `done` holds, looking after each write; False when it does not in time."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not done():
            remaining = deadline - asyncio.get_running_loop().time()
            if remaining <= 0:
                return False
            self._wake.set()
            self._urgent.set()
            await asyncio.wait([self._flushed], timeout=remaining)
        return True

    async def run(self) -> None:
        """Writes until cancelled."""
        delay = _FIRST_RETRY
        now = asyncio.get_running_loop().time
        begun = now() - APPEND_INTERVAL
        while True:
            await self._wake.wait()
            if not self._urgent.is_set() and now() < begun + APPEND_INTERVAL:
                try:
                    async with asyncio.timeout_at(begun + APPEND_INTERVAL):
                        await self._urgent.wait()
                except TimeoutError:
                    pass
            begun = now()
            self._wake.clear()
            self._urgent.clear()
            if await self._flush():
                delay = _FIRST_RETRY
            else:
                await asyncio.sleep(delay)
                delay = min(2 * delay, _LAST_RETRY)
                self._wake.set()

    async def _flush(self) -> bool:
        """One write of everything that is not stored; False when the store is out of reach."""
        dirty, self._dirty = self._dirty, {}
        parking, self._parking = self._parking, {}
        work: list[_Work] = [item for generation in (dirty | parking).values() for item in _operations(generation)]
        work += [(generation, None, _park(generation)) for generation in parking.values() if generation.active]
        if work:
            failpoints.hit("orchestrator.append.before")
            try:
                results = await self._store.write([operation for _, _, operation in work])
            except SessionStoreUnavailable as error:
                self._dirty = dirty | self._dirty
                self._parking = parking | self._parking
                if not self.cut_off:
                    log.error("session store out of reach: %s", error)
                    self.cut_off = True
                    self._listener.on_cut_off()
                return False
            failpoints.hit("orchestrator.append.after")
            if self.cut_off:
                log.warning("session store is back")
            self.cut_off = False
            self._settle_results(work, results)
        flushed, self._flushed = self._flushed, asyncio.get_running_loop().create_future()
        flushed.set_result(None)
        return True

    def _settle_results(self, work: list[_Work], results: list[Result]) -> None:
        """Notes what is durable and tells the listener, once per generation."""
        stored: dict[int, Generation] = {}
        refused: set[int] = set()
        for (generation, sequence, operation), result in zip(work, results, strict=True):
            if id(generation) in refused:
                continue
            if result.stored:
                if sequence is not None and isinstance(operation, Append):
                    self._observer.stored(sequence, operation.first_offset)
                    sequence.durable_count = operation.first_offset + len(operation.ids) // 4
                elif sequence is not None:
                    sequence.ending_stored = True
                else:
                    generation.parked = True
                stored[id(generation)] = generation
            else:
                refused.add(id(generation))
                self._listener.on_refused(generation, sequence, result)
        for generation in stored.values():
            self._listener.on_stored(generation)


def _operations(generation: Generation) -> list[_Work]:
    """What the store lacks of a generation, in order."""
    work: list[_Work] = []
    if not generation.active:
        return work
    name, epoch = generation.name, generation.epoch
    for sequence in generation.sequences:
        choice, first = sequence.choice, sequence.durable_count
        if sequence.count > first:
            ids = pack_ids(sequence.token_ids[first:])
            append = Append(name.tenant, name.session, name.generation, choice, epoch, first, ids)
            work.append((generation, sequence, append))
        if sequence.ending is not None and not sequence.ending_stored:
            finish = Finish(
                name.tenant, name.session, name.generation, choice, epoch, sequence.ending, sequence.ending.count
            )
            work.append((generation, sequence, finish))
    return work


def _park(generation: Generation) -> Park:
    name = generation.name
    return Park(name.tenant, name.session, name.generation, generation.epoch)
