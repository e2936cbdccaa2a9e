"""ShardService: the gRPC face of an engine.

One `Link` per orchestrator process: commands come in, packed results go out, and its end releases everything that was
admitted on it. Knows messages and links; decisions are the scheduler's.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass

from grpc import aio

from fermata.v1 import common_pb2
from services.common.errors import Draining, FermataError, InvalidRequest
from services.common.telemetry import Telemetry
from services.common.types import VERSION, Fingerprint
from services.shard.admission import Limits, from_message
from services.shard.engine import Commands, Engine, Report
from services.shard.observer import Observer
from services.shard.outbox import HEARTBEAT, Outbox, load_message
from services.shard.outcome import Load, Outcome
from services.shard.sequence import Admission
from services.shard.v1 import shard_pb2, shard_pb2_grpc


@dataclass(frozen=True, slots=True)
class Description:
    """What `Describe` tells; see the fields of `DescribeResponse`."""

    fingerprint: Fingerprint
    context_length: int
    vocabulary_size: int
    block_size: int
    block_count: int
    step_tokens: int
    step_sequences: int


class ShardService(shard_pb2_grpc.ShardServiceServicer):
    """Serves one engine to any number of orchestrators.

    Args:
        engine: not yet started.
        description: what it serves.
        telemetry: takes what it tells of its work.
        process_id: names this process.
        heartbeat: seconds of silence on a link until a heartbeat (R7).
    """

    def __init__(
        self,
        engine: Engine,
        description: Description,
        telemetry: Telemetry,
        process_id: str,
        *,
        heartbeat: float = HEARTBEAT,
    ) -> None:
        self.engine, self.description, self._heartbeat = engine, description, heartbeat
        self._observer = Observer(telemetry, process_id, description.block_count)
        self._limits = Limits(description.context_length, description.vocabulary_size)
        self._process_id = process_id
        self._link_numbers = itertools.count(1)
        self._outboxes: dict[int, Outbox] = {}
        self._latest = Report(Outcome(), Load(free_blocks=description.block_count), 0, None, [], [])
        self._empty = asyncio.Event()
        self._draining = False

    @property
    def load(self) -> Load:
        """How busy the engine was at its last report."""
        return self._latest.load

    def start(self) -> None:
        """Starts the engine; its reports come to the running event loop."""
        loop = asyncio.get_running_loop()
        self.engine.start(lambda report: loop.call_soon_threadsafe(self._deliver, report))

    async def stop(self) -> None:
        """Ends the engine after its current step. Must come before the end of the event loop."""
        await asyncio.to_thread(self.engine.stop)

    async def drain(self) -> None:
        """Asks all orchestrators to move their sequences (R19), waits until they did, then ends their links."""
        self._draining = True
        for outbox in self._outboxes.values():
            outbox.drain()
        while self._latest.load.running or self._latest.load.waiting:
            self._empty.clear()
            await self._empty.wait()
        for outbox in self._outboxes.values():
            outbox.close()

    async def Describe(
        self,
        request: shard_pb2.DescribeRequest,
        context: aio.ServicerContext[shard_pb2.DescribeRequest, shard_pb2.DescribeResponse],
    ) -> shard_pb2.DescribeResponse:
        """What this shard is."""
        values = {name: value for name, value in asdict(self.description).items() if name != "fingerprint"}
        fingerprint = common_pb2.Fingerprint(**asdict(self.description.fingerprint))
        return shard_pb2.DescribeResponse(
            process_id=self._process_id, version=VERSION, fingerprint=fingerprint, **values
        )

    async def Link(
        self,
        request_iterator: AsyncIterator[shard_pb2.LinkRequest],
        context: aio.ServicerContext[shard_pb2.LinkRequest, shard_pb2.LinkResponse],
    ) -> AsyncIterator[shard_pb2.LinkResponse]:
        """One orchestrator: its commands in, its results out, until either end is done."""
        outbox = self._open()
        reader = asyncio.create_task(self._read(outbox, request_iterator))
        reader.add_done_callback(lambda _: outbox.close())
        try:
            async for message in outbox.messages():
                yield message
            if reader.done():
                reader.result()  # raises what a command raised
        finally:
            reader.cancel()
            self._close(outbox)

    def _open(self) -> Outbox:
        link = next(self._link_numbers)
        outbox = Outbox(link, lambda: load_message(self._latest), heartbeat=self._heartbeat)
        self._outboxes[link] = outbox
        if self._draining:
            outbox.drain()
        return outbox

    def _close(self, outbox: Outbox) -> None:
        del self._outboxes[outbox.link]
        self._observer.link_closed(outbox.link)
        self.engine.submit(Commands(outbox.link, closes=True))

    async def _read(self, outbox: Outbox, requests: AsyncIterator[shard_pb2.LinkRequest]) -> None:
        async for request in requests:
            attempts, counts = request.grants.attempts, request.grants.counts
            if len(attempts) != len(counts):
                raise InvalidRequest(f"grants: {len(attempts)} attempts and {len(counts)} counts")
            for attempt in request.releases:
                self._observer.left(outbox.link, attempt)
            for generation_id in request.traced_generations:
                self._observer.collect(generation_id)
            self.engine.submit(
                Commands(
                    link=outbox.link,
                    admissions=self._admissions(outbox, request),
                    grants=list(zip(attempts, counts, strict=True)),
                    releases=list(request.releases),
                )
            )

    def _admissions(self, outbox: Outbox, request: shard_pb2.LinkRequest) -> list[Admission]:
        """The valid ones of a message. Each of the others is answered, and harms nobody else."""
        admissions = []
        for admit in request.admits:
            try:
                if self._draining:
                    raise Draining("this shard is about to leave")
                admissions.append(from_message(admit, outbox.link, self._limits))
                outbox.expect(admit.attempt)
                self._observer.admitted(
                    outbox.link, admit.attempt, admit.generation_id, admit.choice, admit.trace_context
                )
            except FermataError as error:
                outbox.add_ended(admit.attempt, error)
        return admissions

    def _deliver(self, report: Report) -> None:
        """Sorts a report into the boxes of its links; those of links that are gone are dropped."""
        self._latest = report
        self._observer.reported(report)
        outboxes, outcome = self._outboxes, report.outcome
        for admitted in outcome.admitted:
            if admitted.link in outboxes:
                started_ns = report.timings.started if report.timings is not None else 0
                outboxes[admitted.link].add_admitted(admitted.attempt, admitted.cached_tokens, started_ns)
        for link, tokens in outcome.tokens.items():
            if link in outboxes and report.timings is not None:
                outboxes[link].add_step(report.load.steps, tokens, report.timings)
        for ended in outcome.ended:
            if ended.link in outboxes:
                outboxes[ended.link].add_ended(ended.attempt, ended.error)
                self._observer.left(ended.link, ended.attempt, ended.error.reason)
        if not report.load.running and not report.load.waiting:
            self._empty.set()
