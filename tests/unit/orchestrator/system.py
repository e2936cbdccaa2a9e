"""Orchestrators in this process over a real Valkey and fake shards, driven through their own gRPC calls."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from grpc import aio

from fermata.v1 import common_pb2
from services.common import rpc
from services.common.directory import StaticDirectory
from services.common.errors import FermataError
from services.common.types import pack_ids
from services.config import OrchestratorConfig
from services.orchestrator import serving
from services.orchestrator.service import OrchestratorService
from services.orchestrator.v1 import orchestrator_pb2 as pb
from services.orchestrator.v1.orchestrator_pb2_grpc import (
    OrchestratorServiceStub,
)

if TYPE_CHECKING:
    from services.orchestrator.v1.orchestrator_pb2_grpc import OrchestratorServiceAsyncStub

CONTEXT = [1, 2, 3, 4]
SEED = 7


def write_vocabulary(folder: Path) -> None:
    """A tokenizer whose ids 1.. are single letters and whose id 0 is a control token."""
    letters = {chr(ord("a") + index % 26) * (1 + index // 26): index + 1 for index in range(63)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 0,
                "content": "<|end|>",
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        ],
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "WordLevel", "vocab": {"<|end|>": 0, **letters}, "unk_token": "a"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@dataclass
class Orchestrator:
    """One orchestrator with its server."""

    running: serving.Orchestrator
    address: str
    group: asyncio.TaskGroup
    channel: aio.Channel = field(init=False)

    def __post_init__(self) -> None:
        self.channel = rpc.inside_channel(self.address)

    @property
    def service(self) -> OrchestratorService:
        return self.running.service

    @property
    def stub(self) -> OrchestratorServiceAsyncStub:
        return OrchestratorServiceStub(self.channel)

    async def drop(self) -> None:
        """Goes away without grace: what was not written is lost, readers see a broken stream."""
        await self.running.close()
        await self.running.server.stop(None)
        await self.channel.close()


@asynccontextmanager
async def orchestrators() -> AsyncIterator[Starter]:
    """A starter whose orchestrators end with the block."""
    async with asyncio.TaskGroup() as group:
        starter = Starter(group)
        try:
            yield starter
        finally:
            for orchestrator in starter.running:
                await orchestrator.drop()


class Starter:
    """Starts orchestrators."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self.running: list[Orchestrator] = []
        self._group = group

    async def start(self, folder: Path, redis_url: str, shards: Sequence[str], **settings: float) -> Orchestrator:
        """One orchestrator; `settings` are fields of its configuration."""
        config = OrchestratorConfig(model=str(folder), redis_url=redis_url, **settings)  # type: ignore[arg-type]
        running = serving.Orchestrator(config, StaticDirectory(shards))
        await running.service.start(self._group)
        await running.server.start()
        orchestrator = Orchestrator(running, f"{config.host}:{running.port}", self._group)
        self.running.append(orchestrator)
        return orchestrator

    async def drop(self, orchestrator: Orchestrator) -> None:
        """Ends one as a crash would."""
        self.running.remove(orchestrator)
        await orchestrator.drop()


def open_request(**changes: object) -> pb.OpenRequest:
    """A request for 20 tokens with SEED; `changes` are fields of the spec, stop rules or request."""
    stop = pb.StopRules(max_tokens=20, token_ids=[0])
    spec = pb.GenerationSpec(stop=stop, n=1)
    spec.sampling.seed = SEED
    request = pb.OpenRequest(tenant="default", prompt_token_ids=pack_ids(CONTEXT), request_hash=b"h", spec=spec)
    for name, value in changes.items():
        for target in (request.spec.stop, request.spec, request):
            if name in target.DESCRIPTOR.fields_by_name:
                if target.DESCRIPTOR.fields_by_name[name].is_repeated:
                    getattr(target, name).extend(value)
                else:
                    setattr(target, name, value)
                break
        else:
            raise AttributeError(name)
    return request


@dataclass
class Reading:
    """A reader on a Read stream of its own, and what it was sent."""

    orchestrator: Orchestrator
    name: pb.Name
    acknowledges: bool = True
    ids: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    hashes: dict[int, bytes] = field(default_factory=dict)
    durable: dict[int, int] = field(default_factory=dict)
    terminals: dict[int, pb.Terminal] = field(default_factory=dict)
    attached: list[pb.Attached] = field(default_factory=list)
    responses: list[pb.ReadResponse] = field(default_factory=list)
    error: FermataError | None = None

    async def start(self, cursors: Sequence[common_pb2.Cursor] = (), tails: Sequence[common_pb2.Tail] = ()) -> Reading:
        """Attaches."""
        self.call = self.orchestrator.stub.Read()
        attach = pb.Attach(reader=1, name=self.name, cursors=cursors, tails=tails)
        await self.call.write(pb.ReadRequest(attaches=[attach]))
        for cursor in cursors:
            self.ids[cursor.choice] = [-1] * cursor.count
        return self

    async def until(self, count: int = 10**9, choice: int = 0, choices: int = 1) -> Reading:
        """Reads until it has `count` tokens of a choice, all choices have ended, or it was ended."""
        while self.error is None and len(self.terminals) < choices and len(self.ids[choice]) < count:
            await self.read_message()
        return self

    async def read_message(self) -> None:
        """Reads one message, whatever it says."""
        response = await asyncio.wait_for(self.call.read(), 15)
        assert isinstance(response, pb.ReadResponse), "the stream broke"
        self._take(response)
        if self.acknowledges:
            with contextlib.suppress(aio.AioRpcError, asyncio.InvalidStateError):  # it may just have been ended
                await self.call.write(pb.ReadRequest(acknowledged=response.sequence))

    def leave(self) -> None:
        """Goes away without a word."""
        self.call.cancel()

    def _take(self, response: pb.ReadResponse) -> None:
        self.responses.append(response)
        self.attached += response.attached
        batch, first = response.tokens, 0
        for entry, (choice, offset, length) in enumerate(
            zip(batch.choices, batch.first_offsets, batch.lengths, strict=True)
        ):
            assert offset == len(self.ids[choice])
            self.ids[choice] += batch.token_ids[first : first + length]
            self.hashes[choice] = batch.running_hashes[8 * entry : 8 * entry + 8]
            self.durable[choice] = batch.durable_counts[entry]
            first += length
        for finished in response.finished:
            assert finished.terminal.choice not in self.terminals
            self.terminals[finished.terminal.choice] = finished.terminal
        for ended in response.ended:
            self.error = rpc.from_status(ended.status)
