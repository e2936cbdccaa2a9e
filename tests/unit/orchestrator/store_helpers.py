"""What tests of the session store share: stores by name of their process, generations, a link that loses replies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.types import FinishReason, pack_ids
from services.orchestrator.session_encoding import session_prefix
from services.orchestrator.session_records import (
    Append,
    Finish,
    GenerationRecord,
    NewGeneration,
    Operation,
    Park,
    Result,
    SessionRecord,
    Terminal,
)
from services.orchestrator.sessions import SessionStore

TENANT = "tenant"


@asynccontextmanager
async def open_stores(url: str, *names: str, ttl: float = 3600.0) -> AsyncIterator[list[SessionStore]]:
    """Stores of processes with these names."""
    stores = [SessionStore(url, process_id=name, address=f"{name}:1", ttl=ttl) for name in names]
    try:
        for store in stores:
            await store.connect()
        yield stores
    finally:
        for store in stores:
            await store.close()


@dataclass
class Run:
    """A generation, as one owner sees it."""

    store: SessionStore
    session: str
    generation: str
    epoch: int
    tenant: str = TENANT

    def seen_by(self, store: SessionStore, epoch: int = 0) -> Run:
        return Run(store, self.session, self.generation, epoch or self.epoch, self.tenant)

    def key(self, suffix: str) -> str:
        return session_prefix(self.tenant, self.session) + suffix

    @property
    def record_key(self) -> str:
        return self.key(f"g:{self.generation}")

    def append_at(self, first: int, ids: Sequence[int], choice: int = 0) -> Append:
        where = (self.tenant, self.session, self.generation)
        return Append(*where, choice=choice, epoch=self.epoch, first_offset=first, ids=pack_ids(ids))

    def finish_with(self, terminal: Terminal) -> Finish:
        where = (self.tenant, self.session, self.generation)
        return Finish(*where, terminal.choice, self.epoch, terminal, terminal.count)

    async def write(self, operation: Operation) -> Result:
        (result,) = await self.store.write([operation])
        return result

    async def append(self, first: int, ids: Sequence[int], choice: int = 0) -> Result:
        return await self.write(self.append_at(first, ids, choice))

    async def finish(self, count: int, reason: FinishReason = FinishReason.MAX_TOKENS, choice: int = 0) -> Result:
        return await self.write(self.finish_with(Terminal(choice, reason, count)))

    async def park(self) -> Result:
        return await self.write(Park(self.tenant, self.session, self.generation, self.epoch))

    async def record(self) -> GenerationRecord:
        (record,) = await self.store.load_generations(self.tenant, self.session, [self.generation])
        return record

    async def meta(self) -> SessionRecord:
        return await self.store.load_session(self.tenant, self.session)


async def begin(store: SessionStore, session: str = "", **fields: Any) -> Run:
    """Opens a generation, in a new session unless one is named."""
    tenant = fields.pop("tenant", TENANT)
    found, generation = await store.ids_for(tenant, "", session)
    fields = {"new_session": not session, **fields}
    opened = await store.open(NewGeneration(tenant=tenant, session=found, generation=generation, **fields))
    assert opened.created
    return Run(store, found, generation, opened.epoch, tenant)


class LossyLink:
    """A unix socket in front of the server that can lose a reply: the command arrives, its answer does not."""

    def __init__(self, path: Path, target: Path) -> None:
        self.url = f"unix://{path}"
        self.lose_next = False
        self.lost = 0
        self._path, self._target = path, target
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> LossyLink:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        server_reader, server_writer = await asyncio.open_unix_connection(self._target)
        upward = asyncio.create_task(self._copy(reader, server_writer))
        try:
            while data := await server_reader.read(65536):
                if self.lose_next:
                    self.lose_next = False
                    self.lost += 1
                    break
                writer.write(data)
        finally:
            upward.cancel()
            writer.close()
            server_writer.close()
            self._tasks.discard(task)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()
