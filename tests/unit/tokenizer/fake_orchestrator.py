"""An orchestrator that obeys tests: a real gRPC server with scripted generations, a shared log, and faults to order.

Several of them over one `FakeLog` are as several orchestrators over one session store. The output of a generation is
known beforehand, so what a reader is given can be held against it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from grpc import aio

from fermata.running_hash import EMPTY_HASH, extend_hash, hash_ids
from fermata.v1 import common_pb2, generation_pb2
from services.common import rpc
from services.common.errors import FermataError, GenerationNotFound, NeedFrom
from services.common.types import pack_ids, unpack_ids
from services.common.vocabulary import Vocabulary, pending_bytes
from services.orchestrator.v1 import orchestrator_pb2 as pb
from services.orchestrator.v1.orchestrator_pb2_grpc import (
    OrchestratorServiceServicer,
    add_OrchestratorServiceServicer_to_server,
)

SESSION = "a" * 26
SEED = 77


@dataclass(eq=False)
class FakeGeneration:
    """One generation.

    Attributes:
        generation_id: its id.
        request: what it was opened with.
        outputs: what each choice will put out.
        reason: how the choices end.
        cut_bytes: bytes at the end that are not part of the text.
        logged: how many tokens of each choice the log has; a reader gets no more.
        cuts: yields how many tokens the next message has.
    """

    generation_id: str
    request: pb.OpenRequest
    outputs: list[list[int]]
    vocabulary: Vocabulary
    reason: common_pb2.FinishReason.ValueType = common_pb2.FINISH_REASON_MAX_TOKENS
    cut_bytes: int = 0
    logged: list[int] = field(default_factory=list)
    cuts: Callable[[], Iterator[int]] = lambda: iter(lambda: 1, 0)
    fingerprint: common_pb2.Fingerprint | None = None
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.said = [self.vocabulary.bytes_of(output) for output in self.outputs]
        table = self.vocabulary.table
        self.ends = [[0, *itertools.accumulate(len(table[i]) for i in output)] for output in self.outputs]
        self.hashes = [list(itertools.accumulate(output, extend_hash, initial=EMPTY_HASH)) for output in self.outputs]

    def log(self, *counts: int) -> None:
        """Lets the log have so many tokens of each choice; without counts all."""
        self.logged = list(counts) or [len(output) for output in self.outputs]
        self.moved.set()
        self.moved = asyncio.Event()

    def held(self, choice: int, count: int) -> int:
        """Bytes at the end of the first `count` tokens that may still become a stop string."""
        end = self.ends[choice][count]
        said = self.said[choice][max(0, end - 300) : end]
        stops = [stop.encode() for stop in self.request.spec.stop.strings]
        return max((_overlap(said, stop) for stop in stops), default=0)

    def opened(self) -> pb.Opened:
        spec = pb.GenerationSpec()
        spec.CopyFrom(self.request.spec)
        if not spec.sampling.HasField("seed"):
            spec.sampling.seed = SEED
        return pb.Opened(
            session_id=self.generation_id.partition(".")[0],
            generation_id=self.generation_id,
            spec=spec,
            prompt_tokens=len(self.request.prompt_token_ids) // 4,
            cached_tokens=3,
            fingerprint=self.fingerprint,
        )

    def terminal(self, choice: int) -> pb.Terminal:
        output = self.outputs[choice]
        return pb.Terminal(
            choice=choice,
            finish_reason=self.reason,
            count=len(output),
            cut_bytes=self.cut_bytes,
            running_hash=hash_ids(output),
            prompt_tokens=len(self.request.prompt_token_ids) // 4,
            cached_tokens=3,
        )

    def text(self, choice: int = 0) -> str:
        """The whole text that a reader must get."""
        said = self.vocabulary.bytes_of(self.outputs[choice])
        return said[: len(said) - self.cut_bytes].decode(errors="replace")


def _overlap(said: bytes, stop: bytes) -> int:
    longest = min(len(stop) - 1, len(said))
    return next((length for length in range(longest, 0, -1) if said.endswith(stop[:length])), 0)


@dataclass
class FakeLog:
    """What a session store would hold.

    Attributes:
        plan: makes a generation of an Open.
        generations: by id.
        by_request: ids by request_id.
        turns: what OpenSession answers.
    """

    plan: Callable[[pb.OpenRequest, str], FakeGeneration]
    generations: dict[str, FakeGeneration] = field(default_factory=dict)
    by_request: dict[str, str] = field(default_factory=dict)
    turns: list[pb.Turn] = field(default_factory=list)

    def open(self, request: pb.OpenRequest) -> tuple[FakeGeneration, bool]:
        known = self.by_request.get(request.request_id)
        if known is not None:
            return self.generations[known], False
        generation_id = f"{request.session_id or SESSION}.{len(self.generations):016x}"
        generation = self.plan(request, generation_id)
        self.generations[generation_id] = generation
        self.by_request[request.request_id] = generation_id
        return generation, True

    def find(self, name: pb.Name) -> FakeGeneration:
        generation = self.generations.get(name.generation_id or self.by_request.get(name.request_id, ""))
        if generation is None:
            raise GenerationNotFound("no such generation", metadata={"generation_id": name.generation_id})
        return generation


class Stream:
    """One Read stream."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[pb.ReadResponse | None] = asyncio.Queue()
        self.pumps: dict[int, asyncio.Task[None]] = {}
        self.sequence = 0

    def send(self, **content: object) -> None:
        self.sequence += 1
        self.queue.put_nowait(pb.ReadResponse(sequence=self.sequence, **content))  # type: ignore[arg-type]


class FakeOrchestrator(OrchestratorServiceServicer):
    """One orchestrator.

    Attributes:
        log: shared with others.
        attaches: all that came.
        opens: requests to open, each with its metadata.
        detaches: readers that left.
        acknowledged: highest acknowledgement.
        streams: the Read streams that are open.
        calls: names of unary calls that came.
        errors: raised by the next unary calls, one each.
        attach_errors: answered to the next attaches, one each.
        break_after: tokens after which all Read streams break.
        mute: say nothing on Read streams.
        draining: as ReadResponse.draining.
    """

    def __init__(self, log: FakeLog) -> None:
        self.log = log
        self.attaches: list[pb.Attach] = []
        self.opens: list[tuple[pb.OpenRequest, dict[str, Any]]] = []
        self.detaches: list[int] = []
        self.acknowledged = 0
        self.streams: set[Stream] = set()
        self.calls: list[str] = []
        self.errors: list[FermataError] = []
        self.attach_errors: list[FermataError] = []
        self.break_after = -1
        self.mute = False
        self.draining = False
        self.identity = pb.IdentifyResponse(process_id="p", context_length=100)
        self.address = ""
        self._server: aio.Server | None = None

    async def start(self, port: int = 0) -> None:
        self._server = rpc.inside_server()
        add_OrchestratorServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{rpc.bind(self._server, '127.0.0.1', port)}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.errors:
            raise self.errors.pop(0)

    async def Open(self, request: pb.OpenRequest, context: rpc.Context) -> pb.OpenResponse:
        self._called("Open")
        self.opens.append((request, dict(context.invocation_metadata() or ())))
        generation, created = self.log.open(request)
        session_id = generation.generation_id.partition(".")[0]
        return pb.OpenResponse(session_id=session_id, generation_id=generation.generation_id, created=created)

    async def Cancel(self, request: pb.CancelRequest, context: rpc.Context) -> pb.CancelResponse:
        self._called("Cancel")
        generation = self.log.find(request.name)
        return pb.CancelResponse(terminals=[generation.terminal(i) for i in range(len(generation.outputs))])

    async def OpenSession(self, request: pb.OpenSessionRequest, context: rpc.Context) -> pb.OpenSessionResponse:
        self._called("OpenSession")
        return pb.OpenSessionResponse(turns=self.log.turns, generation_count=len(self.log.turns))

    async def GetGeneration(self, request: pb.GetGenerationRequest, context: rpc.Context) -> pb.GetGenerationResponse:
        self._called("GetGeneration")
        generation = self.log.find(request.name)
        counts = generation.logged
        ended = [i for i, output in enumerate(generation.outputs) if counts[i] == len(output)]
        return pb.GetGenerationResponse(
            opened=generation.opened(),
            state=generation_pb2.GENERATION_STATE_FINISHED
            if len(ended) == len(counts)
            else generation_pb2.GENERATION_STATE_RUNNING,
            output_token_ids=[pack_ids(o[:count]) for o, count in zip(generation.outputs, counts, strict=True)],
            terminals=[generation.terminal(i) for i in ended],
            create_time_ms=1_700_000_000_123,
        )

    async def GetSession(self, request: pb.GetSessionRequest, context: rpc.Context) -> pb.GetSessionResponse:
        self._called("GetSession")
        response = pb.GetSessionResponse()
        response.session.session_id = request.session_id
        return response

    async def ListSessions(self, request: pb.ListSessionsRequest, context: rpc.Context) -> pb.ListSessionsResponse:
        self._called("ListSessions")
        response = pb.ListSessionsResponse(next_page_token=f"{request.page_token}+{request.page_size}")
        response.sessions.add(session_id=SESSION)
        return response

    async def Identify(self, request: pb.IdentifyRequest, context: rpc.Context) -> pb.IdentifyResponse:
        self._called("Identify")
        return self.identity

    async def Read(
        self, request_iterator: AsyncIterator[pb.ReadRequest], context: rpc.Context
    ) -> AsyncIterator[pb.ReadResponse]:
        stream = Stream()
        self.streams.add(stream)
        taker = asyncio.create_task(self._take(stream, request_iterator))
        try:
            while True:
                try:
                    async with asyncio.timeout(0.5):
                        response = await stream.queue.get()
                except TimeoutError:
                    stream.sequence += 1
                    response = pb.ReadResponse(sequence=stream.sequence)
                if response is None:
                    return
                response.draining = self.draining
                if not self.mute:
                    yield response
        finally:
            self.streams.discard(stream)
            taker.cancel()
            for pump in stream.pumps.values():
                pump.cancel()

    async def _take(self, stream: Stream, requests: AsyncIterator[pb.ReadRequest]) -> None:
        async for request in requests:
            self.acknowledged = max(self.acknowledged, request.acknowledged)
            for attach in request.attaches:
                self.attaches.append(attach)
                stream.pumps[attach.reader] = asyncio.create_task(self._serve(stream, attach))
            for number in request.detaches:
                self.detaches.append(number)
                stream.pumps.pop(number).cancel()

    async def _serve(self, stream: Stream, attach: pb.Attach) -> None:
        """One reader."""
        try:
            if self.attach_errors:
                raise self.attach_errors.pop(0)
            generation = self.log.find(attach.name)
            counts = [0] * len(generation.outputs)
            for cursor in attach.cursors:
                counts[cursor.choice] = self._start(generation, cursor, attach)
        except FermataError as error:
            stream.send(ended=[pb.ReaderEnded(reader=attach.reader, status=rpc.to_status(error))])
            return
        starts = [
            pb.ChoiceStart(
                choice=i,
                count=count,
                pending=pending_bytes(generation.vocabulary.bytes_of(output[:count]), generation.held(i, count)),
            )
            for i, (output, count) in enumerate(zip(generation.outputs, counts, strict=True))
        ]
        stream.send(attached=[pb.Attached(reader=attach.reader, opened=generation.opened(), choices=starts)])
        await self._pump(stream, attach.reader, generation, counts)

    def _start(self, generation: FakeGeneration, cursor: common_pb2.Cursor, attach: pb.Attach) -> int:
        logged = generation.logged[cursor.choice]
        output = generation.outputs[cursor.choice]
        if cursor.count > logged:
            tail = next((tail for tail in attach.tails if tail.choice == cursor.choice), None)
            if tail is None:
                raise NeedFrom("log is short", metadata={"choice": str(cursor.choice), "count": str(logged)})
            assert tail.first_offset <= logged
            assert list(tail.token_ids) == output[tail.first_offset : cursor.count]
            generation.logged[cursor.choice] = cursor.count
        if cursor.running_hash:
            assert cursor.running_hash == hash_ids(output[: cursor.count])
        return cursor.count

    async def _pump(self, stream: Stream, reader: int, generation: FakeGeneration, counts: list[int]) -> None:
        cuts = generation.cuts()
        told: set[int] = set()
        while len(told) < len(counts):
            moved = generation.moved
            for choice, output in enumerate(generation.outputs):
                while counts[choice] < generation.logged[choice]:
                    end = min(counts[choice] + next(cuts), generation.logged[choice])
                    self.send_tokens(stream, reader, generation, counts[choice], end, choice=choice)
                    counts[choice] = end
                    await asyncio.sleep(0)
                if counts[choice] == len(output) and choice not in told:
                    told.add(choice)
                    finished = pb.ReaderFinished(reader=reader, terminal=generation.terminal(choice))
                    stream.send(finished=[finished])
            if len(told) < len(counts):
                await moved.wait()

    def send_tokens(
        self, stream: Stream, reader: int, generation: FakeGeneration, first: int, end: int, *, choice: int = 0
    ) -> None:
        """Sends tokens first to end - 1 of a choice."""
        output = generation.outputs[choice]
        batch = pb.TokenBatch(
            readers=[reader],
            choices=[choice],
            first_offsets=[first],
            lengths=[end - first],
            token_ids=output[first:end],
            held_bytes=[generation.held(choice, end)],
            running_hashes=generation.hashes[choice][end],
            durable_counts=[first],
        )
        top = generation.request.spec.output.top_logprobs
        if generation.request.spec.output.logprobs:
            batch.logprobs.extend(-float(token_id) for token_id in output[first:end])
            batch.top_counts.extend([top] * (end - first))
            for token_id in output[first:end]:
                batch.top_token_ids.extend(range(token_id, token_id + top))
                batch.top_logprobs.extend([-0.5] * top)
        stream.send(tokens=batch)
        if self.break_after >= 0:
            self.break_after -= end - first
            if self.break_after < 0:
                for open_stream in self.streams:
                    open_stream.queue.put_nowait(None)

    async def ListGenerations(
        self, request: pb.ListGenerationsRequest, context: rpc.Context
    ) -> pb.ListGenerationsResponse:
        raise NotImplementedError

    async def ForkSession(self, request: pb.ForkSessionRequest, context: rpc.Context) -> pb.ForkSessionResponse:
        raise NotImplementedError

    async def UpdateSession(self, request: pb.UpdateSessionRequest, context: rpc.Context) -> pb.UpdateSessionResponse:
        raise NotImplementedError

    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: rpc.Context) -> pb.DeleteSessionResponse:
        raise NotImplementedError

    async def Score(self, request: pb.ScoreRequest, context: rpc.Context) -> pb.ScoreResponse:
        raise NotImplementedError


def prompt_ids(request: pb.OpenRequest) -> list[int]:
    """What a generation was opened with."""
    return unpack_ids(request.prompt_token_ids)
