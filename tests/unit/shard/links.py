"""A shard behind a real socket, with a model that has no tensors, and an orchestrator's end of its links."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from grpc import aio

from services.common import rpc
from services.common.telemetry import Telemetry, TelemetrySettings
from services.common.types import Fingerprint, pack_ids
from services.shard.blocks import BlockPool
from services.shard.engine import Engine
from services.shard.scheduler import Scheduler
from services.shard.service import Description, ShardService
from services.shard.v1 import shard_pb2, shard_pb2_grpc
from tests.unit.shard.fakes import SIZE, VOCABULARY, FakeRunner

BLOCKS, CONTEXT = 16, 60
HEARTBEAT = 0.1
PROMPT = [1, 2, 3, 4, 5]


def admit(attempt: int = 1, prompt: list[int] = PROMPT, **fields: Any) -> shard_pb2.Admit:
    """A greedy admission that runs to its 8 tokens."""
    program = {"top_p": 1.0, "repetition_penalty": 1.0, **fields.pop("sampling", {})}
    values = {
        "attempt": attempt,
        "generation_id": f"g{attempt}",
        "epoch": 1,
        "tenant": "default",
        "token_ids": pack_ids(prompt),
        "output_start": len(prompt),
        "max_count": 8,
        "grant": 8,
        **fields,
    }
    return shard_pb2.Admit(sampling=shard_pb2.SamplingProgram(**program), **values)


class Link:
    """An orchestrator's end of a link; keeps all messages."""

    def __init__(self, stub: shard_pb2_grpc.ShardServiceAsyncStub) -> None:
        self.call = stub.Link()
        self.messages: list[shard_pb2.LinkResponse] = []

    async def send(self, *admits: shard_pb2.Admit, **fields: Any) -> None:
        await self.call.write(shard_pb2.LinkRequest(admits=admits, **fields))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Reads until a condition holds."""
        async with asyncio.timeout(30):
            while not holds():
                message = await self.call.read()
                assert message is not aio.EOF, "the link ended"
                self.messages.append(message)  # type: ignore[arg-type]

    @property
    def steps(self) -> list[shard_pb2.Step]:
        return [step for message in self.messages for step in message.steps]

    @property
    def ended(self) -> dict[int, Any]:
        return {each.attempt: rpc.from_status(each.status) for message in self.messages for each in message.ended}

    @property
    def load(self) -> shard_pb2.Load:
        """The latest one."""
        return [message.load for message in self.messages if message.HasField("load")][-1]

    def tokens(self, attempt: int) -> list[int]:
        return [
            token_id
            for step in self.steps
            for each, token_id in zip(step.attempts, step.token_ids, strict=True)
            if each == attempt
        ]

    async def until_tokens(self, attempt: int, count: int = 8) -> list[int]:
        await self.until(lambda: len(self.tokens(attempt)) >= count)
        return self.tokens(attempt)

    async def until_load(self, holds: Callable[[shard_pb2.Load], bool]) -> None:
        """Reads until a load that comes from now on fulfils a condition."""
        start = len(self.messages)
        await self.until(
            lambda: any(message.HasField("load") and holds(message.load) for message in self.messages[start:])
        )


@dataclass
class System:
    """A running shard."""

    runner: FakeRunner
    service: ShardService
    address: str
    channels: list[aio.Channel] = field(default_factory=list)

    def stub(self) -> shard_pb2_grpc.ShardServiceAsyncStub:
        """Over a connection of its own."""
        self.channels.append(rpc.inside_channel(self.address))
        return shard_pb2_grpc.ShardServiceStub(self.channels[-1])

    def link(self) -> Link:
        return Link(self.stub())

    def narrow_link(self) -> Link:
        """Takes 64 KiB ahead of its reader, where gRPC would find out how much the way can hold."""
        options = [("grpc.http2.lookahead_bytes", 65535), ("grpc.http2.bdp_probe", 0)]
        self.channels.append(aio.insecure_channel(self.address, options=options))
        return Link(shard_pb2_grpc.ShardServiceStub(self.channels[-1]))


@asynccontextmanager
async def serving() -> AsyncIterator[System]:
    """A shard on a free port, with a heartbeat every tenth of a second."""
    runner = FakeRunner(BLOCKS, SIZE)
    scheduler = Scheduler(BlockPool(BLOCKS, SIZE), step_tokens=32, step_sequences=8, context_length=CONTEXT)
    fingerprint = Fingerprint(model="fake", weights="w", kernels="k", tokenizer="t")
    description = Description(fingerprint, CONTEXT, VOCABULARY, SIZE, BLOCKS, 32, 8)
    telemetry = Telemetry("shard", TelemetrySettings())
    service = ShardService(Engine(scheduler, runner), description, telemetry, "a" * 32, heartbeat=HEARTBEAT)
    server = rpc.inside_server()
    shard_pb2_grpc.add_ShardServiceServicer_to_server(service, server)
    system = System(runner, service, f"127.0.0.1:{rpc.bind(server, '127.0.0.1', 0)}")
    service.start()
    await server.start()
    yield system
    for channel in system.channels:
        await channel.close()
    await server.stop(0)
    await service.stop()
