"""The session store when its server dies, hangs, forgets, is full or is the wrong one (R10, R15; P5, P6, P10)."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.common.errors import FermataError, Overloaded, SessionNotFound, SessionStoreUnavailable
from services.orchestrator.session_records import BranchPoint, Claimed, ResultKind
from services.orchestrator.sessions import SessionStore
from tests.unit.orchestrator.store_helpers import TENANT, Run, begin, open_stores
from tests.valkey import Valkey, start_valkey


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Valkey]:
    """A server of the test's own, to be broken."""
    (tmp_path / "data").mkdir()
    server = start_valkey(tmp_path / "data")
    yield server
    server.stop()


async def calls_of(one: SessionStore, run: Run) -> list[Callable[[], Awaitable[object]]]:
    """One of each kind of call."""
    return [
        lambda: run.append(0, [1]),
        lambda: begin(one),
        run.meta,
        run.record,
        lambda: one.claim(TENANT, run.session, run.generation, expected_owner="one"),
        lambda: one.list_sessions(TENANT, 1, ""),
        one.renew_lease,
        one.orphans,
        one.now_ms,
    ]


async def assert_unavailable(call: Callable[[], Awaitable[object]], *, within: float) -> None:
    begun = time.monotonic()
    with pytest.raises(SessionStoreUnavailable) as raised:
        await call()
    assert time.monotonic() - begun < within
    assert raised.value.retry_delay == 1.0


async def test_a_killed_server_keeps_every_acknowledged_append(server: Valkey) -> None:
    """P6: SIGKILL loses nothing that was acknowledged; the unacknowledged tail may or may not be there."""
    async with open_stores(server.url, "one") as (one,):
        runs = [await begin(one) for _ in range(4)]
        acknowledged, many = 0, asyncio.Event()

        async def append_on() -> None:
            nonlocal acknowledged
            while True:
                results = await one.write([run.append_at(acknowledged, [acknowledged]) for run in runs])
                assert {result.kind for result in results} <= {ResultKind.OK, ResultKind.DUPLICATE}
                acknowledged += 1
                if acknowledged == 200:
                    many.set()

        appending = asyncio.create_task(append_on())
        await many.wait()
        server.kill()
        with pytest.raises(SessionStoreUnavailable):
            await appending
        server.restart()
        for run in runs:
            (log,) = (await run.record()).logs
            assert log == list(range(len(log))) and len(log) in (acknowledged, acknowledged + 1)
            assert (await run.append(acknowledged, [acknowledged])).stored, "repeating is right in either case"
            assert (await run.meta()).epoch == run.epoch


@pytest.mark.parametrize("fault", ["frozen", "dead"])
async def test_a_silent_server_is_unavailable_within_two_seconds(server: Valkey, fault: str) -> None:
    async with open_stores(server.url, "one") as (one,):
        run = await begin(one)
        calls = await calls_of(one, run)
        if fault == "frozen":
            server.freeze()
        else:
            server.kill()
        begun = time.monotonic()
        await asyncio.gather(*(assert_unavailable(call, within=2.5) for call in calls))
        assert time.monotonic() - begun < 3.0
        await assert_unavailable(calls[0], within=2.5)
        if fault == "frozen":
            server.thaw()
        else:
            server.restart()
        assert (await run.append(0, [1])).stored, "it is back without another word"
        assert (await run.record()).logs == [[1]]


async def test_connect_says_why_not(tmp_path: Path) -> None:
    store = SessionStore(f"unix://{tmp_path}/nobody", process_id="one", address="one:1", ttl=1)
    await assert_unavailable(store.connect, within=1.0)
    with pytest.raises(SessionStoreUnavailable):
        await store.ids_for(TENANT, "request", "")
    await store.close()
    with pytest.raises(ValueError):
        SessionStore("http://host", process_id="one", address="one:1", ttl=1)


async def test_writes_behind_a_frozen_server_wait_their_turn_only_so_long(server: Valkey) -> None:
    """The writer has one connection: who waits for it gives up as well."""
    async with open_stores(server.url, "one") as (one,):
        run = await begin(one)
        server.freeze()
        await asyncio.gather(*(assert_unavailable(lambda: run.append(0, [1]), within=2.5) for _ in range(5)))
        server.thaw()
        assert (await run.append(0, [1])).stored


async def test_a_cancelled_caller_leaves_its_write_behind(server: Valkey) -> None:
    """Never cancelled, hence never a new connection, nor another caller's reply on the old one."""
    async with open_stores(server.url, "one") as (one,), Redis.from_url(server.url) as raw:
        run = await begin(one)
        before = (await raw.info("stats"))["total_connections_received"]
        for offset in range(50):
            writing = asyncio.create_task(run.append(offset, [offset]))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            writing.cancel()
            assert (await run.append(offset, [offset])).stored
        await one.close()
        assert (await run.record()).logs == [list(range(50))]
        received = (await raw.info("stats"))["total_connections_received"] - before
        assert received <= 2, "close() and the reading after it, perhaps"


async def test_close_waits_for_what_is_under_way(server: Valkey) -> None:
    async with open_stores(server.url, "one", "two") as (one, two):
        run = await begin(one)
        writing = asyncio.create_task(run.append(0, [1]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        writing.cancel()
        await one.close()
        assert (await run.seen_by(two).record()).logs == [[1]]


async def test_an_emptied_store_is_noticed(server: Valkey) -> None:
    async with open_stores(server.url, "one") as (one,), Redis.from_url(server.url) as raw:
        run = await begin(one)
        await run.append(0, [1, 2])
        await raw.flushall()
        for result in (await run.append(2, [3]), await run.finish(2), await run.park()):
            assert result.kind is ResultKind.MISSING
        with pytest.raises(SessionNotFound):
            await run.meta()
        assert await raw.keys("*") == [], "nothing is made up"


@asynccontextmanager
async def gone_back(server: Valkey, copy: Path) -> AsyncIterator[None]:
    """What happens inside is forgotten: the server comes back with the data of before."""
    server.stop()
    shutil.copytree(server.folder, copy)
    server.restart()
    yield
    server.kill()
    shutil.rmtree(server.folder)
    shutil.copytree(copy, server.folder)
    server.restart()


async def test_a_store_that_went_back_fences_the_owner_with_a_lower_epoch(server: Valkey, tmp_path: Path) -> None:
    """R10: FENCED with a lower stored epoch = the store went back: claim again and write again from memory."""
    async with open_stores(server.url, "one", "two") as (one, two):
        run = await begin(one)
        await run.append(0, [1, 2])
        where = (TENANT, run.session, run.generation)
        async with gone_back(server, tmp_path / "copy"):
            claimed = await two.claim(*where, expected_owner="one")
            assert isinstance(claimed, Claimed)
            theirs = run.seen_by(two, claimed.epoch)
            assert (await theirs.append(2, [3, 4])).stored
        fenced = await theirs.append(4, [5])
        assert (fenced.kind, fenced.epoch, fenced.owner) == (ResultKind.FENCED, run.epoch, "one")
        assert fenced.epoch < theirs.epoch
        again = await two.claim(*where, expected_owner=fenced.owner)
        assert isinstance(again, Claimed) and again.epoch > theirs.epoch, "never an epoch twice"
        behind = await theirs.append(4, [5])
        assert (behind.kind, behind.count) == (ResultKind.CONFLICT, 2)
        assert (await theirs.append(behind.count, [3, 4, 5])).kind is ResultKind.OK
        assert (await theirs.record()).logs == [[1, 2, 3, 4, 5]]
        assert (await run.append(5, [6])).kind is ResultKind.FENCED


async def test_a_store_that_went_back_shows_the_same_owner_a_shorter_log(server: Valkey, tmp_path: Path) -> None:
    async with open_stores(server.url, "one") as (one,):
        run = await begin(one)
        await run.append(0, [1, 2])
        async with gone_back(server, tmp_path / "copy"):
            assert (await run.append(2, [3, 4])).stored
            assert (await run.finish(4)).stored
            following = await begin(one, run.session, parent=BranchPoint(run.generation, 0, 4))
            assert (await following.append(0, [9])).stored
        assert (await following.append(1, [9])).kind is ResultKind.MISSING
        behind = await run.append(4, [5])
        assert (behind.kind, behind.count) == (ResultKind.CONFLICT, 2)
        finish = await run.finish(4)
        assert (finish.kind, finish.count) == (ResultKind.CONFLICT, 2)
        assert [result.stored for result in (await run.append(2, [3, 4]), await run.finish(4))] == [True, True]


async def test_a_full_store_refuses_new_generations_and_says_that_it_is_full(tmp_path: Path) -> None:
    server = start_valkey(tmp_path)
    try:
        async with open_stores(server.url, "one") as (one,), Redis.from_url(server.url) as raw:
            run = await begin(one)
            await run.append(0, [1])
            await raw.config_set("maxmemory", "1")
            with pytest.raises(Overloaded) as raised:
                await begin(one)
            assert raised.value.retry_delay == 1.0
            await assert_unavailable(lambda: run.append(1, [2]), within=1.0)
            assert (await run.record()).logs == [[1]], "it can still be read"
            await raw.config_set("maxmemory", "0")
            assert (await run.append(1, [2])).kind is ResultKind.OK
    finally:
        server.stop()


async def test_a_store_that_evicts_is_pointed_out(server: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    async with Redis.from_url(server.url) as raw:
        for policy, warned in (("noeviction", False), ("allkeys-lru", True)):
            await raw.config_set("maxmemory", "100mb", "maxmemory-policy", policy)
            async with open_stores(server.url, "one"):
                assert ("noeviction" in caplog.text) == warned


async def test_a_replica_is_unavailable_for_writing(server: Valkey, tmp_path: Path) -> None:
    async with open_stores(server.url, "one") as (one,), Redis.from_url(server.url) as raw:
        run = await begin(one)
        await raw.replicaof("127.0.0.1", 1)
        await assert_unavailable(lambda: run.append(0, [1]), within=1.0)
        await assert_unavailable(lambda: begin(one), within=1.0)
        await raw.replicaof("NO", "ONE")
        assert (await run.append(0, [1])).stored


@pytest.mark.parametrize(
    ("version", "mode", "refusal"),
    [
        ("5.0.14", "standalone", "Redis 5.0.14"),
        ("6.0.9", "standalone", "Redis 6.0.9"),
        ("7.2.4", "cluster", "cluster"),
        ("6.2.0", "standalone", "refused a call"),
        ("10.0", "standalone", "refused a call"),
    ],
)
async def test_a_server_that_does_not_fit_is_refused(tmp_path: Path, version: str, mode: str, refusal: str) -> None:
    """A server that says what it is, and knows nothing else: the last two fail only at the next command."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            facts = f"# Server\r\nredis_version:{version}\r\nredis_mode:{mode}\r\n"
            told = b"$%d\r\n%s\r\n" % (len(facts), facts.encode())
            writer.write(told if b"INFO" in data else b"-ERR unknown command\r\n")
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "socket"):
        store = SessionStore(f"unix://{tmp_path}/socket", process_id="one", address="one:1", ttl=1)
        with pytest.raises(FermataError, match=refusal) as raised:
            await store.connect()
        assert isinstance(raised.value, SessionStoreUnavailable) == (refusal != "refused a call")
        await store.close()
