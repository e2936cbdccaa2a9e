"""Dead, silent and leaving servers: to which other the streams of a client go, and how fast (R7, R18, R19)."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from fermata import AsyncClient, Client
from fermata.errors import (
    Unavailable,
)
from fermata.events import Event
from tests.unit.clients.collecting import TEXT, Read, Reading, check_whole
from tests.unit.clients.fake_server import (
    FakeServer,
    Feed,
    Log,
    after,
    silence,
)
from tests.unit.clients.proxy import Proxy


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("messages", [0, 3])
async def test_silence_is_a_dead_link(read: Read, messages: int) -> None:
    log = Log.of(TEXT)
    async with FakeServer(log) as server:
        server.script.append(after(messages, silence))
        begin = time.monotonic()
        check_whole(await read(server.address), log)
        assert 0.4 <= time.monotonic() - begin < 2.0


@pytest.mark.usefixtures("impatient")
async def test_heartbeats_keep_a_link_alive(read: Read) -> None:
    log = Log.of(TEXT)

    async def act(feed: Feed) -> Any:
        yield feed.started()
        for _ in range(8):
            await asyncio.sleep(0.1)
            yield feed.heartbeat()
        for event in [*feed.tokens(), *feed.finished()]:
            yield event

    async with FakeServer(log) as server:
        server.script.append(act)
        check_whole(await read(server.address), log)
        assert len(server.calls) == 1


@pytest.mark.usefixtures("impatient")
async def test_frozen_link_is_left_for_another(read: Read) -> None:
    log = Log.of(TEXT)
    async with FakeServer(log) as server, Proxy(server) as proxy:
        server.endpoints.extend(["127.0.0.1:1", server.address])
        server.script.append(after(5, proxy.freeze))
        check_whole(await read(proxy.address), log)
        assert proxy.connections >= 1


async def test_dead_server_is_left_for_the_other_it_told_of(read: Read) -> None:
    log = Log.of(TEXT)
    async with FakeServer(log) as one, FakeServer(log) as two:
        one.endpoints.extend([one.address, two.address])
        one.script.append(after(5, one.kill))
        begin = time.monotonic()
        check_whole(await read(one.address), log)
        assert time.monotonic() - begin < 1.0
        assert [name for name, _ in two.calls] == ["Resume"]


async def test_server_without_health_is_alive(read: Read) -> None:
    log = Log.of(TEXT)
    async with FakeServer(log, with_health=False) as server, Proxy(server) as proxy:
        server.script.append(after(5, proxy.cut))
        check_whole(await read(proxy.address), log)


async def test_draining_moves_to_the_other(read: Read) -> None:
    log = Log.of(TEXT)
    async with FakeServer(log) as one, FakeServer(log) as two:
        one.endpoints.extend([one.address, two.address])

        async def drains(feed: Feed) -> None:
            await one.serve(False)

        async def act(feed: Feed) -> Any:
            for event in [feed.started(), *feed.tokens(3)]:
                yield event
            await drains(feed)
            yield feed.heartbeat(draining=True)
            await silence(feed)

        one.script.append(act)
        check_whole(await read(one.address), log)
        assert two.requests("Resume")[0].cursors[0].count == 3
        assert one.requests("Cancel") == []


async def test_draining_without_another_stays(read: Read) -> None:
    log = Log.of(TEXT)

    async def act(feed: Feed) -> Any:
        await feed.server.serve(False)
        for event in [feed.started(), feed.heartbeat(draining=True), *feed.tokens(), *feed.finished()]:
            yield event

    async with FakeServer(log) as server:
        server.script.append(act)
        check_whole(await read(server.address), log)
        assert len(server.calls) == 1


async def test_gives_up_in_time(read: Read) -> None:
    begin = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        await read("127.0.0.1:1", give_up_after=0.5)
    assert 0.2 < time.monotonic() - begin < 2.0
    assert "gave up after 0.5 s" in caught.value.__notes__
    assert caught.value.reason == ""


async def test_server_that_comes_later_is_found(read: Read) -> None:
    log = Log.of(TEXT)
    server = FakeServer(log)
    async with server:
        pass  # its port is free again
    reading = asyncio.ensure_future(read(server.address))
    await asyncio.sleep(0.3)
    async with server:
        check_whole(await reading, log)


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_many_streams_of_one_client_move_together(kind: str) -> None:
    """Their server dies under them: they share what they dial instead of dialling each."""
    log = Log.of(TEXT)
    count = 16
    arrived = asyncio.Semaphore(0)
    async with FakeServer(log) as one, FakeServer(log) as two, Proxy(two) as proxy:
        one.endpoints.extend([one.address, proxy.address])

        async def all_there(feed: Feed) -> None:
            arrived.release()
            await silence(feed)

        one.script.extend(after(3, all_there) for _ in range(count))

        def in_threads() -> list[Reading]:
            from concurrent.futures import ThreadPoolExecutor

            with Client(one.address) as client, ThreadPoolExecutor(count) as pool:
                streams = [client.stream("a prompt") for _ in range(count)]
                lists: list[list[Event]] = list(pool.map(list, streams))
            return [Reading(events, stream) for events, stream in zip(lists, streams, strict=True)]

        async def in_tasks() -> list[Reading]:
            async def collect(stream: Any) -> Reading:
                return Reading([event async for event in stream], stream)

            async with AsyncClient(one.address) as client:
                return await asyncio.gather(*(collect(client.stream("a prompt")) for _ in range(count)))

        readings = asyncio.ensure_future(in_tasks() if kind == "async" else asyncio.to_thread(in_threads))
        for _ in range(count):
            await arrived.acquire()
        await one.kill()
        for reading in await readings:
            check_whole(reading, log)
        assert proxy.connections <= 3


@pytest.mark.usefixtures("impatient")
async def test_slow_consumer_is_not_silence() -> None:
    log = Log.of(TEXT)
    async with FakeServer(log) as server, AsyncClient(server.address) as client:
        stream = client.stream("a prompt")
        events = [await anext(stream), await anext(stream)]
        await asyncio.sleep(0.9)
        events += [event async for event in stream]
        check_whole(Reading(events, stream), log)
        assert len(server.calls) == 1
