"""A real session store for the tests of this room, empty at the start of each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.orchestrator.sessions import SessionStore
from tests.unit.orchestrator.fake_shard import FakeShard
from tests.unit.orchestrator.house import House
from tests.unit.orchestrator.store_helpers import open_stores
from tests.unit.orchestrator.system import orchestrators, write_vocabulary
from tests.valkey import Valkey, start_valkey


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """One server for the whole room; who breaks it starts another one."""
    server = start_valkey(tmp_path_factory.mktemp("valkey"))
    yield server
    server.stop()


@pytest.fixture
async def valkey(valkey_server: Valkey) -> Valkey:
    """The server, emptied."""
    async with Redis.from_url(valkey_server.url) as client:
        await client.flushall()
    return valkey_server


@pytest.fixture
async def raw(valkey: Valkey) -> AsyncIterator[Redis]:
    """A plain client, to look at records and to damage them."""
    async with Redis.from_url(valkey.url) as client:
        yield client


@pytest.fixture
async def stores(valkey: Valkey) -> AsyncIterator[list[SessionStore]]:
    """The stores of two processes."""
    async with open_stores(valkey.url, "one", "two") as stores:
        yield stores


@pytest.fixture
def one(stores: list[SessionStore]) -> SessionStore:
    """The store of the process `one`."""
    return stores[0]


@pytest.fixture
def two(stores: list[SessionStore]) -> SessionStore:
    """The store of the process `two`."""
    return stores[1]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """A store and a fake shard; the test starts as many orchestrators as it likes."""
    write_vocabulary(tmp_path)
    (tmp_path / "store").mkdir()
    valkey = start_valkey(tmp_path / "store")
    shard = FakeShard()
    await shard.start()
    try:
        async with orchestrators() as starter:
            yield House(tmp_path, valkey, shard, starter)
    finally:
        await shard.drop()
        valkey.stop()
