"""Readers as cursors over the logs of generations, multiplexed on one stream per tokenizer process (R4, R5, R8).

A reader never slows a generation: it is a set of counts, and what it lacks is packed when its stream can take more.
Knows how to pack; not who owns what.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from services.common import rpc
from services.common.errors import FermataError, SlowReader
from services.orchestrator.convert import opened_message, terminal_message, write_first_moments, write_moments
from services.orchestrator.generation import Generation, GenerationSpec
from services.orchestrator.sequence import Sequence
from services.orchestrator.v1 import orchestrator_pb2

HEARTBEAT_INTERVAL = 1.0
"""Seconds of silence after which an empty message is sent (R7)."""
UNACKNOWLEDGED_LIMIT = 64
"""Messages in flight beyond which new ones wait and grow (R5)."""
SLOW_LIMIT = 10.0
"""Seconds without an acknowledgement after which a stream is ended (R5)."""


class Reader:
    """One reader of one generation.

    Attributes:
        stream: that it reads on.
        number: its name there.
        generation: what it reads.
        counts: tokens it was sent, by choice.
        told: choices whose end it was sent.
    """

    __slots__ = ("counts", "generation", "number", "stream", "told")

    def __init__(self, stream: ReadStream, number: int, generation: Generation, counts: list[int]) -> None:
        self.stream = stream
        self.number = number
        self.generation = generation
        self.counts = counts
        self.told: set[int] = set()


class ReadStream:
    """All readers of one tokenizer process.

    Attributes:
        readers: by number.
    """

    def __init__(
        self, *, is_cut_off: Callable[[], bool], on_done: Callable[[Generation], None], with_moments: bool
    ) -> None:
        """Makes a stream without readers.

        Args:
            is_cut_off: whether the session store is out of reach (`Generation.shows_ending`).
            on_done: told of a generation when a reader has everything of it.
            with_moments: say when what happened to each token (R25), whether its reader asked for it or not.
        """
        self.readers: dict[int, Reader] = {}
        self._is_cut_off = is_cut_off
        self._on_done = on_done
        self._with_moments = with_moments
        self._wake = asyncio.Event()
        self._moved: dict[int, Reader] = {}
        self._attached: list[orchestrator_pb2.Attached] = []
        self._ended: list[orchestrator_pb2.ReaderEnded] = []
        self._sequence = 0
        self._acknowledged = 0
        self._progress = self._last_sent = time.monotonic()
        self._draining = False
        self._closed: FermataError | None = None
        self._open = True

    def attach(self, reader: Reader) -> None:
        """Begins to serve a reader: first what its generation is, then what its cursors lack."""
        self.readers[reader.number] = reader
        reader.generation.readers.add(reader)
        starts = [
            orchestrator_pb2.ChoiceStart(choice=sequence.choice, count=count, pending=sequence.pending(count))
            for sequence, count in zip(reader.generation.sequences, reader.counts, strict=True)
        ]
        opened = opened_message(reader.generation)
        self._attached.append(orchestrator_pb2.Attached(reader=reader.number, opened=opened, choices=starts))
        self.mark(reader)

    def announce_again(self, reader: Reader) -> None:
        """Tells a reader that the fingerprint changed (R20)."""
        opened = opened_message(reader.generation)
        self._attached.append(orchestrator_pb2.Attached(reader=reader.number, opened=opened))
        self._wake.set()

    def detach(self, number: int) -> Reader | None:
        """Forgets a reader that left."""
        reader = self.readers.pop(number, None)
        if reader is not None:
            self._moved.pop(number, None)
            reader.generation.readers.discard(reader)
        return reader

    def end(self, number: int, error: FermataError) -> None:
        """Ends a reader, attached or not, with the reason."""
        self.detach(number)
        self._ended.append(orchestrator_pb2.ReaderEnded(reader=number, status=rpc.to_status(error)))
        self._wake.set()

    def mark(self, reader: Reader) -> None:
        """Notes that a reader's generation moved."""
        self._moved[reader.number] = reader
        self._wake.set()

    def acknowledge(self, sequence: int) -> None:
        """The other end has taken in all messages up to this one."""
        if sequence > self._acknowledged:
            self._acknowledged = sequence
            self._progress = time.monotonic()
            self._wake.set()

    def drain(self) -> None:
        """Tells the other end to attach elsewhere."""
        self._draining = True
        self._wake.set()

    def close(self) -> None:
        """Ends the stream after what was said already."""
        self._open = False
        self._wake.set()

    def tick(self, now: float) -> None:
        """Called a few times per second (`now` as of time.monotonic): heartbeats, and the end of a slow stream."""
        if self._sequence > self._acknowledged and now - self._progress > SLOW_LIMIT:
            self._closed = SlowReader(f"nothing was acknowledged for {SLOW_LIMIT:.0f} s; attach again")
        if self._closed is not None or now - self._last_sent >= HEARTBEAT_INTERVAL:
            self._wake.set()

    async def responses(self) -> AsyncIterator[orchestrator_pb2.ReadResponse]:
        """The messages of the stream, one per wake-up.

        Raises:
            SlowReader: the other end stopped acknowledging.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._closed is not None:
                raise self._closed
            if not self._open:
                return
            now = time.monotonic()
            beat = now - self._last_sent >= HEARTBEAT_INTERVAL
            full = self._sequence - self._acknowledged >= UNACKNOWLEDGED_LIMIT
            if (full and not beat) or not (beat or self._moved or self._attached or self._ended or self._draining):
                continue
            if self._sequence == self._acknowledged:
                self._progress = now  # the clock of the slow limit starts with the first message in flight
            yield self._next_response(with_tokens=not full)
            self._last_sent = now

    def _next_response(self, *, with_tokens: bool) -> orchestrator_pb2.ReadResponse:
        """Packs everything since the last message."""
        self._sequence += 1
        response = orchestrator_pb2.ReadResponse(
            sequence=self._sequence, attached=self._attached, ended=self._ended, draining=self._draining
        )
        self._attached, self._ended = [], []
        if with_tokens and self._moved:
            self._pack_moved(response)
        response.departed_ns = time.monotonic_ns()
        return response

    def _pack_moved(self, response: orchestrator_pb2.ReadResponse) -> None:
        """Adds the tokens and ends that the moved readers lack."""
        packer = _TokenPacker()
        cut_off = self._is_cut_off()
        done: list[Reader] = []
        for reader in self._moved.values():
            generation = reader.generation
            for sequence in generation.sequences:
                choice = sequence.choice
                visible = generation.visible_count(sequence)
                if visible > reader.counts[choice]:
                    first, moments = reader.counts[choice], self._with_moments or generation.spec.timings
                    packer.add(reader.number, sequence, first, visible, generation.spec, with_moments=moments)
                    reader.counts[choice] = visible
                if choice not in reader.told and generation.shows_ending(sequence, cut_off=cut_off):
                    reader.told.add(choice)
                    terminal = terminal_message(sequence)
                    response.finished.add(reader=reader.number, terminal=terminal)
            if len(reader.told) == len(generation.sequences):
                done.append(reader)
        self._moved = {}
        packer.write_to(response.tokens)
        for reader in done:
            self.detach(reader.number)
            self._on_done(reader.generation)


class _TokenPacker:
    """Collects the parallel arrays of one TokenBatch: lists are filled first, messages once (it is the hot path)."""

    def __init__(self) -> None:
        self.readers: list[int] = []
        self.choices: list[int] = []
        self.first_offsets: list[int] = []
        self.lengths: list[int] = []
        self.token_ids: list[int] = []
        self.held_bytes: list[int] = []
        self.hashes: list[bytes] = []
        self.durable_counts: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.wants_logprobs = False
        self.timed: list[tuple[int, Sequence, int, int]] = []

    def add(
        self, reader: int, sequence: Sequence, first: int, end: int, spec: GenerationSpec, *, with_moments: bool
    ) -> None:
        """Adds tokens first to end - 1 of a choice, for one reader."""
        self.readers.append(reader)
        self.choices.append(sequence.choice)
        self.first_offsets.append(first)
        self.lengths.append(end - first)
        if with_moments:
            self.timed.append((len(self.token_ids), sequence, first, end))
        self.token_ids += sequence.token_ids[first:end]
        self.held_bytes.append(sequence.held(end))
        self.hashes.append(sequence.running_hash(end))
        self.durable_counts.append(sequence.durable_count)
        self.logprobs += sequence.logprobs[first:end]
        self.top_logprobs += sequence.top_logprobs[first:end]
        self.wants_logprobs = self.wants_logprobs or spec.logprobs

    def write_to(self, batch: orchestrator_pb2.TokenBatch) -> None:
        """Fills the message."""
        if not self.readers:
            return
        batch.readers.extend(self.readers)
        batch.choices.extend(self.choices)
        batch.first_offsets.extend(self.first_offsets)
        batch.lengths.extend(self.lengths)
        batch.token_ids.extend(self.token_ids)
        batch.held_bytes.extend(self.held_bytes)
        batch.running_hashes = b"".join(self.hashes)
        batch.durable_counts.extend(self.durable_counts)
        if self.wants_logprobs:
            batch.logprobs.extend(self.logprobs)
            batch.top_counts.extend(len(entries) for entries in self.top_logprobs)
            for entries in self.top_logprobs:
                batch.top_token_ids.extend(token_id for token_id, _ in entries)
                batch.top_logprobs.extend(logprob for _, logprob in entries)
        if self.timed:
            self._write_moments(batch)

    def _write_moments(self, batch: orchestrator_pb2.TokenBatch) -> None:
        """Adds when what happened (R25)."""
        known: dict[tuple[int, int], int] = {}
        numbers = [0] * len(self.token_ids)
        for start, sequence, first, end in self.timed:
            for place, offset in enumerate(range(first, end), start):
                step, visible = sequence.steps[offset], sequence.visible_ns(offset)
                number = known.get((id(step), visible))
                if number is None:
                    number = known[id(step), visible] = len(known) + 1
                    write_moments(batch.moments.add(), step, visible)
                numbers[place] = number
            if first == 0 and sequence.first is not None:
                write_first_moments(batch.firsts.add(index=start), sequence.first)
        if len(known) > 1 or 0 in numbers:  # else there is nothing to tell apart, as nearly always
            batch.moment_numbers.extend(numbers)
