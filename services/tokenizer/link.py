"""The one persistent stream to an orchestrator, shared by all readers of this process (R8).

Sends attaches, detaches and acknowledgements together, one message per wake-up; hands what arrives to the readers.
Does not know what readers do with it, nor where they go when the link breaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Protocol

from grpc import aio

from services.common import rpc
from services.common.errors import FermataError
from services.common.timings import FirstMoments, StepMoments, TokenMoments
from services.orchestrator.v1 import orchestrator_pb2
from services.tokenizer.reading import Arrived, TopEntries
from services.tokenizer.timing_rows import NotedMoments, note

if TYPE_CHECKING:
    from services.orchestrator.v1.orchestrator_pb2_grpc import OrchestratorServiceAsyncStub

log = logging.getLogger(__name__)

SILENCE_LIMIT = 3.0
"""Seconds without any message after which a link is dead."""
ACKNOWLEDGE_EVERY = 16
"""Messages after which their receipt is told at once; the ticker tells it otherwise."""


_clocks = itertools.count(1)
"""A number for the clock at the other end of each link (R25)."""


class LinkReader(Protocol):
    """What a link tells a reader."""

    def on_attached(self, attached: orchestrator_pb2.Attached) -> None:
        """Tokens follow."""
        ...

    def on_tokens(self, choice: int, arrived: Arrived) -> None:
        """Tokens of one choice."""
        ...

    def on_finished(self, terminal: orchestrator_pb2.Terminal) -> None:
        """A choice has ended."""
        ...

    def on_ended(self, error: FermataError) -> None:
        """The orchestrator does not serve this reader any more."""
        ...

    def on_broken(self, *, leaving: bool) -> None:
        """The link is gone; `leaving` when the orchestrator had said that it would be."""
        ...


class Link:
    """A stream of reads.

    Attributes:
        address: of the orchestrator.
        draining: the orchestrator is about to leave.
        alive: readers can attach.
    """

    def __init__(self, address: str, stub: OrchestratorServiceAsyncStub, on_broken: Callable[[Link], None]) -> None:
        self.address = address
        self.draining = False
        self.alive = True
        self._on_broken = on_broken
        self._readers: dict[int, LinkReader] = {}
        self._clock = next(_clocks)
        self._last_number = 0
        self._attaches: list[orchestrator_pb2.Attach] = []
        self._detaches: list[int] = []
        self._traced: list[str] = []
        self._received = self._acknowledged = 0
        self._heard_at = time.monotonic()
        self._news = asyncio.Event()
        self._call: aio.StreamStreamCall[orchestrator_pb2.ReadRequest, orchestrator_pb2.ReadResponse]
        self._call = stub.Read(self._requests())
        self._task = asyncio.create_task(self._run(), name=f"link to {address}")

    def attach(self, reader: LinkReader, message: orchestrator_pb2.Attach) -> int:
        """Begins to read; returns the reader's name on this link."""
        self._last_number += 1
        message.reader = self._last_number
        self._readers[self._last_number] = reader
        self._attaches.append(message)
        self._news.set()
        return self._last_number

    def detach(self, number: int) -> None:
        """Ends a reading that was not ended by the other side."""
        if self._readers.pop(number, None) is not None:
            self._detaches.append(number)
            self._news.set()

    def trace(self, generation_id: str) -> None:
        """Has the steps of a generation handed to the collector of spans."""
        self._traced.append(generation_id)
        self._news.set()

    def tick(self, now: float) -> None:
        """Called several times per second (`now` as of time.monotonic)."""
        if now - self._heard_at > SILENCE_LIMIT:
            log.warning("link to %s: silent for %.1f s", self.address, now - self._heard_at)
            self._break()
        elif self._received > self._acknowledged:
            self._news.set()

    async def close(self) -> None:
        """Ends the stream and tells nobody."""
        self._readers.clear()
        self._break()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _requests(self) -> AsyncIterator[orchestrator_pb2.ReadRequest]:
        """What there is to say, one message per wake-up, until the link is gone (gRPC itself would wait for ever)."""
        while True:
            await self._news.wait()
            if not self.alive:
                return
            self._news.clear()
            attaches, self._attaches = self._attaches, []
            detaches, self._detaches = self._detaches, []
            traced, self._traced = self._traced, []
            self._acknowledged = self._received
            yield orchestrator_pb2.ReadRequest(
                attaches=attaches, detaches=detaches, acknowledged=self._acknowledged, traced_generations=traced
            )

    async def _run(self) -> None:
        """Hands out what arrives until the stream ends."""
        try:
            async for response in self._call:
                self._take(response)
        except aio.AioRpcError as error:
            log.info("link to %s: %s %s", self.address, error.code().name, error.details())
        except asyncio.CancelledError:
            # Of the call (silence, a closed channel) or of this task: either way nothing more will come.
            pass
        except Exception:
            log.exception("link to %s", self.address)
        self._break()

    def _break(self) -> None:
        """Once: ends the call and tells the readers."""
        if not self.alive:
            return
        self.alive = False
        self._news.set()
        self._call.cancel()
        self._on_broken(self)
        readers, self._readers = self._readers, {}
        for reader in readers.values():
            reader.on_broken(leaving=self.draining)

    def _take(self, response: orchestrator_pb2.ReadResponse) -> None:
        """Hands one message to its readers, in the order of its fields."""
        received_ns = time.monotonic_ns()
        self._heard_at = received_ns / 1e9
        self._received = response.sequence
        if self._received - self._acknowledged >= ACKNOWLEDGE_EVERY:
            self._news.set()
        self.draining = response.draining
        readers = self._readers
        for attached in response.attached:
            if (reader := readers.get(attached.reader)) is not None:
                reader.on_attached(attached)
        if response.tokens.readers:
            self._take_tokens(response.tokens, response.departed_ns, received_ns)
        for finished in response.finished:
            if (reader := readers.get(finished.reader)) is not None:
                reader.on_finished(finished.terminal)
        for ended in response.ended:
            if (reader := readers.pop(ended.reader, None)) is not None:
                reader.on_ended(rpc.from_status(ended.status))

    def _take_tokens(self, batch: orchestrator_pb2.TokenBatch, sent_ns: int, received_ns: int) -> None:
        """Cuts the parallel arrays into entries. Most entries have one token, so this runs once per token."""
        token_ids, hashes = list(batch.token_ids), batch.running_hashes
        all_logprobs = list(batch.logprobs)
        all_tops = _top_entries(batch)
        all_moments = _moments(batch, self._clock, sent_ns, received_ns)
        start = 0
        for index, (number, choice, first_offset, length, held_bytes, durable_count) in enumerate(
            zip(
                batch.readers,
                batch.choices,
                batch.first_offsets,
                batch.lengths,
                batch.held_bytes,
                batch.durable_counts,
                strict=True,
            )
        ):
            end = start + length
            reader = self._readers.get(number)
            if reader is not None:
                arrived = Arrived(
                    first_offset,
                    token_ids[start:end],
                    held_bytes,
                    hashes[8 * index : 8 * index + 8],
                    durable_count,
                    all_logprobs[start:end],
                    all_tops[start:end],
                    all_moments[start:end],
                )
                reader.on_tokens(choice, arrived)
            start = end


def _moments(batch: orchestrator_pb2.TokenBatch, clock: int, sent_ns: int, received_ns: int) -> list[NotedMoments]:
    """What is known of each token's way; empty when nobody looks."""
    if not batch.moments:
        return []
    known = [
        note(
            TokenMoments(
                _step(item.step) if item.HasField("step") else None, clock, item.visible_ns, sent_ns, received_ns
            )
        )
        for item in batch.moments
    ]
    if batch.moment_numbers:
        unknown = note(TokenMoments(None, clock, received_ns, sent_ns, received_ns))
        moments = [known[number - 1] if number else unknown for number in batch.moment_numbers]
    else:
        moments = known * len(batch.token_ids)
    for item in batch.firsts:
        first = FirstMoments(item.opened_ns, item.claimed_ns, item.placed_ns, item.admitted_ns, item.started_ns)
        moments[item.index] = note(moments[item.index].moments._replace(first=first))
    return moments


def _step(message: orchestrator_pb2.StepMoments) -> StepMoments:
    return StepMoments(
        message.shard,
        message.number,
        message.started_ns,
        message.schedule_ns,
        message.forward_ns,
        message.sample_ns,
        message.departed_ns,
        message.sent_ns,
        message.arrived_ns,
    )


def _top_entries(batch: orchestrator_pb2.TokenBatch) -> list[TopEntries]:
    """The most probable ids of each token; empty when nobody asked."""
    entries: list[TopEntries] = []
    start = 0
    for count in batch.top_counts:
        end = start + count
        entries.append(TopEntries(batch.top_token_ids[start:end], batch.top_logprobs[start:end]))
        start = end
    return entries
