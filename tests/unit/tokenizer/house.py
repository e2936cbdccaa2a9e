"""A tokenizer in this process over fake orchestrators, driven through its public port."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from grpc import aio

from fermata.running_hash import EMPTY_HASH, hash_ids
from fermata.v1 import chat_pb2
from fermata.v1 import generation_pb2 as public
from fermata.v1.generation_pb2_grpc import GenerationServiceStub
from fermata.v1.model_pb2_grpc import ModelServiceStub
from fermata.v1.session_pb2_grpc import SessionServiceStub
from fermata.v1.text_pb2_grpc import TokenizerServiceStub
from services.common import rpc
from services.common.directory import StaticDirectory
from services.common.errors import FermataError
from services.config import TokenizerConfig
from services.orchestrator.v1 import orchestrator_pb2 as pb
from services.tokenizer.codec import Codec
from services.tokenizer.serving import Tokenizer
from tests.unit.tokenizer.fake_orchestrator import FakeGeneration, FakeLog, FakeOrchestrator

TEXT = "Zwölf Boxkämpfer jagen Viktor. 日本語のテキスト。 Привет, мир! 🎵🎶 The end."
"""Characters of one to four bytes."""
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 65535), ("grpc.http2.bdp_probe", 0))
"""Options of a client that takes little beyond what it reads."""


@dataclass
class House:
    """All of it."""

    codec: Codec
    log: FakeLog
    orchestrators: list[FakeOrchestrator]
    tokenizer: Tokenizer
    channel: aio.Channel

    def __post_init__(self) -> None:
        self.generation = GenerationServiceStub(self.channel)
        self.session = SessionServiceStub(self.channel)
        self.text = TokenizerServiceStub(self.channel)
        self.model = ModelServiceStub(self.channel)

    @property
    def first(self) -> FakeOrchestrator:
        return self.orchestrators[0]

    def stream(
        self, prompt: str = "Hello", **fields: object
    ) -> aio.UnaryStreamCall[public.StreamGenerateRequest, public.StreamGenerateResponse]:
        """Asks for a stream."""
        if not {"chat", "token_ids"} & fields.keys():
            fields["prompt"] = prompt
        request = public.GenerationRequest(**fields)  # type: ignore[arg-type]
        return self.generation.StreamGenerate(public.StreamGenerateRequest(generation=request))


@asynccontextmanager
async def house_of(
    codec: Codec,
    outputs: Sequence[Sequence[int]] | Callable[[pb.OpenRequest, str], FakeGeneration] = ((),),
    *,
    orchestrators: int = 1,
    channel_options: Sequence[tuple[str, int]] = (),
    endpoints: Sequence[str] = (),
) -> AsyncIterator[House]:
    """A house whose generations put out `outputs`, all of it logged at once, or what a function says."""

    def plan(request: pb.OpenRequest, generation_id: str) -> FakeGeneration:
        if callable(outputs):
            return outputs(request, generation_id)
        generation = FakeGeneration(generation_id, request, [list(output) for output in outputs], codec.vocabulary)
        generation.log()
        return generation

    log = FakeLog(plan)
    fakes = [FakeOrchestrator(log) for _ in range(orchestrators)]
    for fake in fakes:
        await fake.start()
    config = TokenizerConfig(model="", public_port=0)
    known = StaticDirectory([fake.address for fake in fakes])
    tokenizer = Tokenizer(config, codec, known, StaticDirectory(endpoints))
    await tokenizer.start()
    await tokenizer.server.start()
    channel = aio.insecure_channel(f"127.0.0.1:{tokenizer.public_port}", options=list(channel_options))
    try:
        yield House(codec, log, fakes, tokenizer, channel)
    finally:
        await channel.close()
        await tokenizer.server.stop(0)
        await tokenizer.close()
        for fake in fakes:
            await fake.stop()


class Received:
    """What a reader got, held against the rules as it comes (P1, R2, R4, R16)."""

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.started: list[public.Started] = []
        self.ids: dict[int, list[int]] = {}
        self.text: dict[int, str] = {}
        self.finished: dict[int, public.Finished] = {}
        self.heartbeats: list[public.Heartbeat] = []
        self.logprobs: list[float] = []
        self.tops: list[public.TopLogprobs] = []
        self.token_events = 0
        self._counts = dict(counts or {})
        self._hashes: dict[int, bytes] = {}

    async def read(self, events: AsyncIterable[public.StreamGenerateResponse | public.ResumeResponse]) -> Received:
        async for response in events:
            self.take(response.event)
        return self

    def take(self, event: public.GenerationEvent) -> None:
        kind = event.WhichOneof("event")
        assert kind is not None
        assert self.started or kind == "started", "started is the first"
        getattr(self, f"_take_{kind}")(getattr(event, kind))

    def _take_started(self, started: public.Started) -> None:
        self.started.append(started)

    def _take_tokens(self, tokens: public.Tokens) -> None:
        choice = tokens.choice
        assert choice not in self.finished, "nothing follows the end of a choice"
        ids = self.ids.setdefault(choice, [])
        assert tokens.token_ids
        assert tokens.first_offset == self._counts.get(choice, 0) + len(ids), "ordered, unique, gapless"
        ids.extend(tokens.token_ids)
        if not self._counts.get(choice):
            running = hash_ids(tokens.token_ids, self._hashes.get(choice, EMPTY_HASH))
            assert tokens.running_hash == running
            self._hashes[choice] = running
        self.text[choice] = self.text.get(choice, "") + tokens.text
        self.logprobs.extend(tokens.logprobs)
        self.tops.extend(tokens.top_logprobs)
        self.token_events += 1

    def _take_finished(self, finished: public.Finished) -> None:
        choice = finished.choice
        assert choice not in self.finished, "one end per choice"
        self.text[choice] = self.text.get(choice, "") + finished.text
        self.finished[choice] = finished
        assert finished.running_hash == hash_ids(self.ids.get(choice, ())) or self._counts or not self.ids
        assert finished.count or finished.running_hash == EMPTY_HASH

    def _take_heartbeat(self, heartbeat: public.Heartbeat) -> None:
        self.heartbeats.append(heartbeat)


async def error_of(call: aio.Call) -> FermataError:
    """How a call failed."""
    try:
        if isinstance(call, aio.UnaryUnaryCall):
            await call
        else:
            async for _ in call:  # type: ignore[attr-defined]
                pass
    except aio.AioRpcError as error:
        answer = rpc.from_call_error(error)
        assert answer is not None, error
        assert error.code().name == answer.status
        return answer
    raise AssertionError("the call did not fail")


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Waits for something that comes by itself."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # of another process or library, so there is no event
            await asyncio.sleep(0.01)


Plan = Callable[[pb.OpenRequest, str], FakeGeneration]


def slowly(codec: Codec, output: list[int], visible: int) -> Plan:
    """Generations of which the log has a part at first."""

    def plan(request: pb.OpenRequest, generation_id: str) -> FakeGeneration:
        generation = FakeGeneration(generation_id, request, [output], codec.vocabulary)
        generation.log(visible)
        return generation

    return plan


def in_big_messages(codec: Codec, output: list[int], size: int) -> Plan:
    """Generations that come with many tokens per message."""

    def plan(request: pb.OpenRequest, generation_id: str) -> FakeGeneration:
        generation = FakeGeneration(generation_id, request, [output], codec.vocabulary)
        generation.cuts = lambda: itertools.repeat(size)
        generation.log()
        return generation

    return plan


async def read_some(received: Received, call: aio.UnaryStreamCall[Any, Any], count: int) -> None:
    while len(received.ids.get(0, [])) < count:
        received.take((await anext(aiter(call))).event)


def only(house: House) -> FakeGeneration:
    (generation,) = house.log.generations.values()
    return generation


def user(text: str) -> chat_pb2.Message:
    """What a person says."""
    return chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text=text)])


def chat(*texts: str, **more: bool) -> chat_pb2.ChatInput:
    """What a person says in several messages."""
    return chat_pb2.ChatInput(messages=map(user, texts), **more)  # type: ignore[arg-type]
