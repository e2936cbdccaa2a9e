"""The generations that this process owns, and what happens to them: tokens, grants, readers, parking, endings.

Knows shard links, read streams and the log writer, and decides by `Sequence` and `Generation`; does not know how a
generation is opened, found or taken over (`opening.py`, `recovery.py`), nor any call.
Everything here runs on the event loop and nothing in the path of a step awaits.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Items

from services.common import failpoints, rpc
from services.common.directory import Directory
from services.common.errors import Draining, FermataError, FingerprintMismatch, OwnerChanged
from services.common.timings import FirstMoments
from services.common.types import Cursor, FinishReason, Tail
from services.orchestrator.admissions import Admissions
from services.orchestrator.convert import step_moments
from services.orchestrator.cursors import match_cursors
from services.orchestrator.generation import Generation, GenerationName
from services.orchestrator.log_writer import LogWriter
from services.orchestrator.observer import Observer
from services.orchestrator.readers import Reader, ReadStream
from services.orchestrator.sequence import Sequence
from services.orchestrator.session_records import Result, ResultKind
from services.orchestrator.sessions import SessionStore
from services.orchestrator.shards import ShardLink
from services.shard.v1 import shard_pb2

log = logging.getLogger(__name__)

STORE_PATIENCE = 2.0
"""Seconds that a cancel or a hand-over waits for the session store."""


class Owner:
    """All generations in the memory of this process.

    Attributes:
        generations: by name; those that run here, are being parked, or have ended and are not stored yet.
        admissions: which of them run on which shard.
        writer: of their logs.
        wasted_tokens: computed by shards beyond a stop string or a cancel.
    """

    def __init__(
        self,
        store: SessionStore,
        shards: Directory,
        *,
        window: int,
        park_after: float,
        observer: Observer,
        rewrite: Callable[[Generation], None],
    ) -> None:
        """Makes an owner of nothing.

        Args:
            store: of the logs.
            shards: who they are.
            window: tokens that a shard may run ahead (R11).
            park_after: seconds without a reader (R6).
            observer: is told what happens.
            rewrite: brings a generation back into a store that lost it (R10).
        """
        self.generations: dict[GenerationName, Generation] = {}
        self.admissions = Admissions(shards, self, observer, window=window)
        self.writer = LogWriter(store, self, observer)
        self.wasted_tokens = 0
        self._observer = observer
        self._park_after = park_after
        self._rewrite = rewrite
        self._park_timers: dict[GenerationName, asyncio.TimerHandle] = {}
        self._limit_timers: dict[GenerationName, asyncio.TimerHandle] = {}
        self._parkings: dict[GenerationName, asyncio.Future[bool]] = {}

    # --- starting, parking, ending -----------------------------------------------------------------------------

    def adopt(self, generation: Generation, *, remaining: float | None) -> None:
        """Takes a generation that was just opened or claimed into memory. It is admitted by `admit`.

        Args:
            generation: owned by this process in the session store.
            remaining: seconds until its time limit; None without one.
        """
        self.generations[generation.name] = generation
        self._observer.adopted(generation)
        for sequence in generation.sequences:
            if sequence.ending is not None and not sequence.ending_stored:
                self.writer.mark(generation, sequence)  # the log was complete, its terminal was not written
        if remaining is not None:
            loop = asyncio.get_running_loop()
            self._limit_timers[generation.name] = loop.call_later(
                max(0.0, remaining), self.finish, generation, FinishReason.TIME_LIMIT
            )
        if not generation.readers:
            self._schedule_parking(generation)

    def admit(self, generation: Generation) -> None:
        """Sets a generation going; it waits when no shard answers."""
        try:
            changed = self.admissions.admit(generation)
        except FingerprintMismatch as error:
            self.finish(generation, FinishReason.ERROR, error)
            return
        if changed:
            for reader in generation.readers:
                reader.stream.announce_again(reader)

    def finish(self, generation: Generation, reason: FinishReason, error: FermataError | None = None) -> None:
        """Ends all choices that still run, at their counts."""
        status = rpc.to_status(error).SerializeToString() if error else b""
        for sequence in list(generation.running()):
            sequence.finish(reason, status)
            self.admissions.end(generation, sequence.choice)
            self.writer.mark(generation, sequence)
        self._after_end(generation)
        self._mark_readers(generation)

    def forget(self, generation: Generation) -> None:
        """Drops a generation from memory; the session store has it."""
        self.admissions.release(generation)
        generation.active = False
        if self.generations.get(generation.name) is generation:
            del self.generations[generation.name]
            self._observer.forgotten(generation)
        for timers in (self._park_timers, self._limit_timers):
            timer = timers.pop(generation.name, None)
            if timer is not None:
                timer.cancel()

    async def park(self, generation: Generation) -> bool:
        """Writes what is left of the log, notes in the store that any process may go on with it, and forgets it (R6).

        Returns:
            False when a reader came in the meantime, or when the store is out of reach: then it stays in memory.
        """
        self.admissions.release(generation)
        if not await self.writer.settle(lambda: generation.stored or not generation.active, STORE_PATIENCE):
            self._schedule_parking(generation)
            return False
        if generation.readers or not generation.active or generation.ended:
            return False
        if not generation.spec.detach:  # a detached one is adopted by a sweep once this process is gone (R9)
            self.writer.park(generation)
            await self.writer.settle(lambda: generation.parked or not generation.active, STORE_PATIENCE)
        self.forget(generation)
        return generation.parked

    async def parked(self, generation: Generation) -> None:
        """Waits until a generation that is just being parked has left memory, or will stay."""
        task = self._parkings.get(generation.name)
        if task is not None:
            await asyncio.wait([task])

    async def hand_over(self) -> None:
        """Gives all generations up, so that other processes can go on with them: the end of a drain."""
        error = Draining("this orchestrator is about to leave; resume")
        for generation in list(self.generations.values()):
            self._end_readers(generation, error)
        await asyncio.gather(*(self.park(generation) for generation in list(self.generations.values())))

    def _schedule_parking(self, generation: Generation) -> None:
        if generation.spec.detach or generation.ended or not generation.active:
            return
        loop = asyncio.get_running_loop()
        previous = self._park_timers.pop(generation.name, None)
        if previous is not None:
            previous.cancel()
        self._park_timers[generation.name] = loop.call_later(self._park_after, self._park_if_unread, generation)

    def _park_if_unread(self, generation: Generation) -> None:
        self._park_timers.pop(generation.name, None)
        if not generation.readers and generation.active and not generation.ended:
            task = asyncio.ensure_future(self.park(generation))
            self._parkings[generation.name] = task
            task.add_done_callback(lambda _: self._parkings.pop(generation.name, None))

    def _after_end(self, generation: Generation) -> None:
        """Once all has ended and is stored and was told, memory is not needed any more."""
        if generation.ended:
            timer = self._limit_timers.pop(generation.name, None)
            if timer is not None:
                timer.cancel()
            if generation.stored and not generation.readers:
                self.forget(generation)

    # --- readers -----------------------------------------------------------------------------------------------

    def attach(
        self, stream: ReadStream, number: int, generation: Generation, cursors: Items[Cursor], tails: Items[Tail]
    ) -> None:
        """Begins to serve a reader from its cursors on, and sets the generation going again where it rests.

        Raises:
            CursorOutOfRange, InvalidRequest, LogDiverged, NeedFrom: see `match_cursors`.
        """
        matched = match_cursors(generation, cursors, tails)
        for sequence in matched.grown:
            self.writer.mark(generation, sequence)
        stream.attach(Reader(stream, number, generation, matched.counts))
        timer = self._park_timers.pop(generation.name, None)
        if timer is not None:
            timer.cancel()
        if matched.grown:
            self.admissions.release(generation)
        self.admit(generation)
        self.admissions.renew_grants([generation])

    def detach(self, stream: ReadStream, number: int) -> None:
        """A reader left."""
        reader = stream.detach(number)
        if reader is not None:
            self.on_done(reader.generation)

    def detach_all(self, stream: ReadStream) -> None:
        """A tokenizer left."""
        for number in list(stream.readers):
            self.detach(stream, number)

    def on_done(self, generation: Generation) -> None:
        """A reader is gone. After the last one parking begins, unless the generation was told to go on (R6)."""
        if not generation.readers:
            self._after_end(generation)
            self._schedule_parking(generation)

    def _mark_readers(self, generation: Generation) -> None:
        for reader in generation.readers:
            reader.stream.mark(reader)

    def _end_readers(self, generation: Generation, error: FermataError) -> None:
        for reader in list(generation.readers):
            reader.stream.end(reader.number, error)

    # --- what shards say (LinkListener) ------------------------------------------------------------------------

    def on_ready(self, link: ShardLink) -> None:
        """Admits what waited for a shard."""
        self.admissions.linked()
        for generation in list(self.generations.values()):
            if generation.wanted:
                self.admit(generation)

    def on_admitted(self, link: ShardLink, admitted: shard_pb2.Admitted) -> None:
        """Notes how much of the prompt was cached and when its computation began, once."""
        admission = self.admissions.find(admitted.attempt)
        if admission is not None and admission[1].cached_tokens is None:
            generation, sequence = admission
            sequence.cached_tokens = min(admitted.cached_tokens, sequence.position)
            if generation.opening is not None:
                opened, claimed, placed = generation.opening
                sequence.first = FirstMoments(opened, claimed, placed, admitted.arrived_ns, admitted.started_ns)

    def on_steps(self, link: ShardLink, response: shard_pb2.LinkResponse, arrived_ns: int) -> None:
        """Appends the tokens of one message to their logs and wakes readers and writer."""
        grown: list[tuple[Generation, Sequence]] = []
        for step in response.steps:
            moments = step_moments(step, shard=link.process_id, sent_ns=response.departed_ns, arrived_ns=arrived_ns)
            failpoints.hit("orchestrator.step")
            logprobs = step.logprobs
            tops = _top_entries(step) if step.top_counts else None
            for row, (attempt, token_id, count) in enumerate(
                zip(step.attempts, step.token_ids, step.counts, strict=True)
            ):
                admission = self.admissions.find(attempt)
                if admission is None:  # of an earlier attempt, or beyond a stop string: never logged (R3, R11)
                    self.wasted_tokens += 1
                    continue
                generation, sequence = admission
                if sequence.count + 1 != count:
                    log.error(
                        "shard %s skipped from %d to %d of %s", link.address, sequence.count, count, generation.name
                    )
                    self.admissions.release(generation)
                    self.admit(generation)
                    continue
                ending = sequence.append(
                    token_id,
                    moments,
                    logprob=logprobs[row] if logprobs else math.nan,
                    top_logprobs=tops[row] if tops else None,
                )
                if ending is not None:
                    self.admissions.end(generation, sequence.choice)
                grown.append((generation, sequence))
        generations = dict.fromkeys(generation for generation, _ in grown)
        self.admissions.renew_grants(generations)
        for generation in generations:
            if not generation.spec.committed:
                self._mark_readers(generation)
        for generation, sequence in grown:  # who is woken first goes first, and readers do not wait for the store
            self.writer.mark(generation, sequence)

    def on_ended(self, link: ShardLink, attempt: int, error: FermataError) -> None:
        """An admission failed by itself: this choice alone ends, unless it is only wanted elsewhere."""
        admission = self.admissions.ended(attempt, error.reason)
        if admission is None:
            return
        generation, sequence = admission
        if isinstance(error, OwnerChanged):
            self.lose(generation)
            return
        if isinstance(error, Draining):  # the admission and the news of it met on the way
            self.admissions.release(generation)
            if generation.wanted:
                self.admit(generation)
            return
        log.warning("shard %s ended %s choice %d: %s", link.address, generation.name, sequence.choice, error)
        sequence.finish(FinishReason.ERROR, rpc.to_status(error).SerializeToString())
        self.writer.mark(generation, sequence)
        self._mark_readers(generation)

    def on_broken(self, link: ShardLink) -> None:
        """All admissions of the link are gone; what is wanted goes on elsewhere from its log (R11)."""
        for generation in self.admissions.broken(link, self.generations.values()):
            if generation.wanted:
                self.admit(generation)

    # --- what the session store says (WriteListener) -----------------------------------------------------------

    def on_stored(self, generation: Generation) -> None:
        """Readers of COMMITTED generations, and those who wait for an ending, can be told now."""
        if generation.spec.committed:
            now = time.monotonic_ns()
            for sequence in generation.sequences:
                sequence.shown(now)
        if generation.spec.committed or any(sequence.ending for sequence in generation.sequences):
            self._mark_readers(generation)
        self._after_end(generation)

    def on_refused(self, generation: Generation, sequence: Sequence | None, result: Result) -> None:
        """R10: where the store went back it is written again from memory; where somebody else owns it we stop."""
        log.warning("%s: refused by the store: %s", generation.name, result)
        if result.kind is ResultKind.CONFLICT and sequence is not None and result.count < sequence.count:
            sequence.durable_count = result.count
            self.writer.mark(generation, sequence)
        elif result.kind is ResultKind.MISSING or (
            result.kind is ResultKind.FENCED and result.epoch < generation.epoch
        ):
            self._rewrite(generation)
        else:
            self.lose(generation)

    def on_cut_off(self) -> None:
        """Endings of ASYNC generations are told without the store (R15)."""
        for generation in self.generations.values():
            if any(sequence.ending is not None for sequence in generation.sequences):
                self._mark_readers(generation)

    def lose(self, generation: Generation) -> None:
        """Another process owns it: stop at once."""
        self._end_readers(generation, OwnerChanged("another process goes on with this generation; resume"))
        self.forget(generation)

    # --- the clock ---------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Called a few times per second."""
        now = time.monotonic()
        for link in self.admissions.links.values():
            link.check_silence(now)


def _top_entries(step: shard_pb2.Step) -> list[list[tuple[int, float]]]:
    """The top log-probabilities of each row."""
    entries, first = [], 0
    for count in step.top_counts:
        ids = step.top_token_ids[first : first + count]
        entries.append(list(zip(ids, step.top_logprobs[first : first + count], strict=True)))
        first += count
    return entries
