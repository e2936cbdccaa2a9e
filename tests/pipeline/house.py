"""The whole house in one process: a real Valkey, real gRPC servers and sockets, the real model, and the client library.

Any server can be dropped without grace at an exact moment (`failpoints.on`) and started again. Knows how the parts are
put together and taken apart; judges nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fermata.aio import AsyncClient
from fermata.aio_stream import AsyncStream
from fermata.events import Finished, Started, Tokens
from services.common import failpoints
from services.common.directory import StaticDirectory
from services.config import OrchestratorConfig, ShardConfig, TokenizerConfig
from services.orchestrator.serving import Orchestrator
from services.shard.serving import Shard
from services.tokenizer.codec import Codec
from services.tokenizer.serving import Tokenizer
from tests.history import History, Output, Record
from tests.valkey import Valkey, start_valkey


@dataclass
class House:
    """Two tokenizers, two orchestrators, one shard, a store.

    Attributes:
        model: folder of the model.
        settings: of the orchestrators, by field name.
    """

    folder: Path
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    shard: Shard | None = None
    orchestrators: list[Orchestrator | None] = field(default_factory=lambda: [None, None])
    tokenizers: list[Tokenizer | None] = field(default_factory=lambda: [None, None])
    ports: dict[str, int] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        self.store: Valkey = await asyncio.to_thread(start_valkey, self.folder)
        self._group = await asyncio.TaskGroup().__aenter__()
        self._codec = Codec.load(Path(self.model))
        self._dropping: set[asyncio.Task[None]] = set()
        await self.start_shard()
        for index in range(2):
            await self.start_orchestrator(index)
        await self.start_tokenizer(1)
        await self.start_tokenizer(0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failpoints.configure({}, testing=False)
        for index in range(2):
            await self.drop_tokenizer(index)
            await self.drop_orchestrator(index)
        await self.drop_shard()
        await self._group.__aexit__(None, None, None)
        self.store.stop()

    @property
    def address(self) -> str:
        """Where clients call first: the own port of tokenizer 0."""
        return f"127.0.0.1:{self.ports['tokenizer 0']}"

    async def repair(self) -> None:
        """Starts again whatever was dropped."""
        if self._dropping:
            await asyncio.wait(self._dropping)
        if self.shard is None:
            await self.start_shard()
        for index in range(2):
            if self.orchestrators[index] is None:
                await self.start_orchestrator(index)
        for index in (1, 0):
            if self.tokenizers[index] is None:
                await self.start_tokenizer(index)

    async def start_shard(self) -> None:
        """Starts the shard where it was before."""
        # In float32, as what the tests compare with, though the built-in model is stored in bfloat16.
        config = ShardConfig(model=self.model, port=self.ports.get("shard", 0), kv_memory=64 << 20, dtype="float32")
        self.shard = shard = await Shard.load(config)
        self.ports["shard"] = shard.port
        shard.service.start()
        await shard.server.start()

    async def drop_shard(self) -> None:
        """The shard is gone without a word."""
        shard, self.shard = self.shard, None
        if shard is not None:
            await shard.server.stop(None)
            await shard.close()

    async def start_orchestrator(self, index: int) -> None:
        """Starts an orchestrator where it was before, as a new process."""
        name = f"orchestrator {index}"
        config = OrchestratorConfig(
            model=self.model, redis_url=self.store.url, port=self.ports.get(name, 0), **self.settings
        )
        running = Orchestrator(config, StaticDirectory([f"127.0.0.1:{self.ports['shard']}"]))
        self.ports[name] = running.port
        await running.service.start(self._group)
        await running.server.start()
        self.orchestrators[index] = running

    async def drop_orchestrator(self, index: int) -> None:
        """An orchestrator is gone without a word: nothing more is written, readers see a broken stream."""
        running, self.orchestrators[index] = self.orchestrators[index], None
        if running is not None:
            await running.close()
            await running.server.stop(None)

    async def drop_owner(self) -> None:
        """Drops the orchestrator that runs something."""
        for index, running in enumerate(self.orchestrators):
            if running is not None and running.service.owner.generations:
                await self.drop_orchestrator(index)
                return

    async def start_tokenizer(self, index: int) -> None:
        """Starts a tokenizer where it was before; 0 tells clients of 1."""
        name, orchestrators = f"tokenizer {index}", [f"127.0.0.1:{self.ports[f'orchestrator {i}']}" for i in range(2)]
        endpoints = (f"127.0.0.1:{self.ports['tokenizer 1']}",) if index == 0 else ()
        config = TokenizerConfig(model=self.model, port=self.ports.get(name, 0), public_port=0)
        tokenizer = Tokenizer(config, self._codec, StaticDirectory(orchestrators), StaticDirectory(endpoints))
        self.ports[name] = tokenizer.own_port
        await tokenizer.start()
        await tokenizer.server.start()
        self.tokenizers[index] = tokenizer

    async def drop_tokenizer(self, index: int) -> None:
        """A tokenizer is gone without a word."""
        tokenizer, self.tokenizers[index] = self.tokenizers[index], None
        if tokenizer is not None:
            await tokenizer.server.stop(None)
            await tokenizer.close()

    def drop_at(self, failpoint: str, count: int, drop: Callable[[], Any]) -> None:
        """Drops something when a failpoint is passed for the `count`-th time, on whichever thread that is."""
        loop = asyncio.get_running_loop()

        def begin() -> None:
            task = asyncio.ensure_future(drop())
            self._dropping.add(task)
            task.add_done_callback(self._dropping.discard)

        failpoints.on(failpoint, lambda: loop.call_soon_threadsafe(begin), count=count)


async def read(stream: AsyncStream, history: History, reader: str, *, stop_at: int | None = None) -> bool:
    """Reads a stream into a history.

    Args:
        stream: not begun yet.
        history: takes what comes.
        reader: its name there.
        stop_at: leave as a killed client does, once choice 0 has this many tokens.

    Returns:
        True when the stream came to its end.
    """
    generation = ""
    async for event in stream:
        if isinstance(event, Started):
            generation = event.generation_id
            history.add(Record(reader, generation, "started"))
        elif isinstance(event, Tokens):
            history.add(
                Record(
                    reader,
                    generation or stream.generation_id,
                    "tokens",
                    event.choice,
                    event.first_offset,
                    tuple(event.token_ids),
                    event.text,
                    event.running_hash.hex(),
                    event.durable_count,
                )
            )
            if stop_at is not None and event.choice == 0 and event.first_offset + len(event.token_ids) >= stop_at:
                return False
        elif isinstance(event, Finished):
            history.add(
                Record(
                    reader,
                    generation or stream.generation_id,
                    "finished",
                    event.choice,
                    text=event.text,
                    finish_reason=event.finish_reason.name,
                    count=event.count,
                )
            )
    return True


async def undisturbed(address: str, options: dict[str, Any]) -> dict[int, Output]:
    """What the request gives when nothing happens, by choice."""
    async with AsyncClient(address) as client:
        result = await client.generate(**options)
    return {
        choice.index: Output(tuple(choice.token_ids), choice.text, choice.finish_reason.name)
        for choice in result.choices
    }
