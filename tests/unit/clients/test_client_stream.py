"""Reading a generation, resuming one by hand, closing: sync and async against a real server (R4, R6)."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from fermata import AsyncClient, Client, Started, Tokens
from fermata.errors import (
    DataLoss,
    DeadlineExceeded,
)
from fermata.stream import StreamState
from tests.unit.clients.collecting import TEXT, WORDS, Read, Reading, check_whole, read_all, until
from tests.unit.clients.fake_server import (
    GENERATION_ID,
    SESSION_ID,
    Act,
    FakeServer,
    Feed,
    Log,
    after,
    silence,
    whole,
)
from tests.unit.clients.proxy import Proxy


async def test_undisturbed_stream(read: Read) -> None:
    log = Log.of(TEXT, rest="!")
    async with FakeServer(log, endpoints=["127.0.0.1:1"]) as server:
        reading = await read(f"grpc://{server.address}", max_tokens=WORDS)
    check_whole(reading, log)
    assert [name for name, _ in server.calls] == ["StreamGenerate"]
    assert server.open_streams == 0
    stream = reading.stream
    assert (stream.generation_id, stream.session_id) == (GENERATION_ID, SESSION_ID)
    assert stream.text == log.texts[0] == TEXT + " !"
    assert stream.token_ids == log.token_ids()
    assert stream.cursors == {0: WORDS}
    assert stream.complete
    result = stream.result()
    assert result.text == stream.text
    assert result.seed == 7
    assert result.finish_reason.name == "MAX_TOKENS"
    assert result.usage.output_tokens == WORDS
    started = reading.events[0]
    assert isinstance(started, Started)
    assert (started.n, started.endpoints, started.cached_tokens) == (1, ("127.0.0.1:1",), None)


async def test_timeout_ends_the_reading_not_the_generation(read: Read) -> None:
    """R6."""
    async with FakeServer(Log.of(TEXT)) as server:
        server.script.append(after(3, silence))
        begin = time.monotonic()
        with pytest.raises(DeadlineExceeded) as caught:
            await read(server.address, timeout=0.4)
        assert 0.3 < time.monotonic() - begin < 1.5
        assert caught.value.generation_id == GENERATION_ID
        assert server.requests("Cancel") == []


async def test_timeout_while_nobody_answers(read: Read) -> None:
    begin = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await read("127.0.0.1:1", timeout=0.4)
    assert 0.3 < time.monotonic() - begin < 1.5


async def test_final_only(read: Read) -> None:
    log = Log.of(TEXT)

    async def act(feed: Feed) -> Any:
        yield feed.started()
        for event in feed.finished():
            event.finished.text = log.texts[0]
            yield event

    async with FakeServer(log) as server:
        server.script.append(act)
        reading = await read(server.address, final_only=True)
    assert reading.stream.text == log.texts[0]
    assert reading.stream.result().usage.output_tokens == WORDS


async def test_resume_from_counts(read: Read) -> None:
    log = Log.of(TEXT, rest="!")
    async with FakeServer(log) as server, Proxy(server) as proxy:
        server.script.append(after(2, proxy.cut))
        reading = await read(proxy.address, resume=True, cursors={0: 4})
    assert reading.token_ids == log.token_ids()[4:]
    first, second = (request.cursors[0] for request in server.requests("Resume"))
    assert (first.count, first.running_hash) == (4, b"")
    assert (second.count, second.running_hash) == (6, log.hash(0, 6))
    assert reading.text == " ".join(TEXT.split()[4:]) + " !"


async def test_resume_with_ids_checks_them(read: Read) -> None:
    log = Log.of(TEXT)
    async with FakeServer(log) as server:
        reading = await read(server.address, resume=True, token_ids={0: log.token_ids()[:5]})
        assert reading.token_ids == log.token_ids()[5:]
        assert reading.stream.token_ids == log.token_ids()
        assert server.requests("Resume")[0].cursors[0].running_hash == log.hash(0, 5)
        with pytest.raises(DataLoss):
            await read(server.address, resume=True, token_ids={0: [1, 2, 3]})


async def test_resume_by_request_id(read: Read) -> None:
    log = Log.of(TEXT)
    async with FakeServer(log) as server:
        async with AsyncClient(server.address) as client:
            events = [event async for event in client.resume(request_id="mine", session_id=SESSION_ID)]
        name = server.requests("Resume")[0].generation
    assert (name.request_id, name.session_id) == ("mine", SESSION_ID)
    check_whole(Reading(events, StreamState(None, give_up_after=1)), log)


async def test_close_cancels_exhausting_does_not() -> None:
    """R6, both clients."""
    log = Log.of(TEXT)

    def sync(address: str) -> None:
        with Client(address) as client:
            with client.stream("a prompt") as stream:
                for event in stream:
                    if isinstance(event, Tokens):
                        break
            assert list(stream) == []
            with client.stream("a prompt") as stream:
                list(stream)
            client.stream("never begun").close()

    async def asynchronous(address: str) -> None:
        async with AsyncClient(address) as client:
            async with client.stream("a prompt") as stream:
                async for event in stream:
                    if isinstance(event, Tokens):
                        break
            assert [event async for event in stream] == []
            async with client.stream("a prompt") as stream:
                async for _ in stream:
                    pass
            await client.stream("never begun").aclose()

    for kind in ("sync", "async"):
        async with FakeServer(log) as server:
            server.script.append(after(3, silence))
            await (asyncio.to_thread(sync, server.address) if kind == "sync" else asynchronous(server.address))
            (request,) = server.requests("Cancel")
            assert request.generation.generation_id == GENERATION_ID
            await until(lambda server=server: server.open_streams == 0)  # type: ignore[misc]


async def test_close_before_the_first_event_cancels_by_request_id() -> None:
    async with FakeServer(Log.of(TEXT)) as server, AsyncClient(server.address) as client:

        async def act(feed: Feed) -> Any:
            await silence(feed)
            yield feed.started()

        server.script.append(act)
        stream = client.stream("a prompt", request_id="mine", session_id=SESSION_ID)
        reading = asyncio.ensure_future(anext(stream))
        await until(lambda: server.open_streams == 1)
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await reading
        (request,) = server.requests("Cancel")
        assert (request.generation.request_id, request.generation.session_id) == ("mine", SESSION_ID)


async def test_close_from_another_thread_ends_the_reading() -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        server.script.append(after(2, silence))
        with Client(server.address) as client:
            stream = client.stream("a prompt")
            reading = asyncio.create_task(asyncio.to_thread(list, stream))
            await until(lambda: len(stream.token_ids) == 2)
            await asyncio.to_thread(stream.close)
            assert len(await reading) == 3
            assert len(server.requests("Cancel")) == 1


async def test_closed_client_ends_its_streams() -> None:
    log = Log.of(TEXT)
    async with FakeServer(log) as server:
        server.script.extend([after(2, silence), after(2, silence)])
        client = AsyncClient(server.address)
        stream = client.stream("a prompt")
        reading = asyncio.ensure_future(read_all(stream))
        await until(lambda: len(stream.token_ids) == 2)
        await client.close()
        with pytest.raises(RuntimeError, match="closed"):
            await reading
        with pytest.raises(RuntimeError, match="closed"):
            await client.models()
        sync_client = Client(server.address)
        sync_stream = sync_client.stream("a prompt")
        reading = asyncio.ensure_future(asyncio.to_thread(list, sync_stream))
        await until(lambda: len(sync_stream.token_ids) == 2)
        sync_client.close()
        with pytest.raises(RuntimeError, match="closed"):
            await reading


async def test_leaving_and_detached_streams_do_not_cancel() -> None:
    async with FakeServer(Log.of(TEXT)) as server, AsyncClient(server.address) as client:
        server.script.extend([after(3, silence), after(3, silence)])
        async with client.stream("a prompt", detach=True) as stream:
            await anext(stream)
        stream = client.stream("a prompt")
        await anext(stream)
        stream.leave()
        await until(lambda: server.open_streams == 0)
        assert server.requests("Cancel") == []


async def test_cancelled_task_can_read_on() -> None:
    log = Log.of(TEXT)
    async with FakeServer(log) as server, AsyncClient(server.address) as client:
        server.script.append(after(3, silence))
        stream = client.stream("a prompt")
        events = [await anext(stream) for _ in range(4)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await anext(stream)
        events += [event async for event in stream]
        check_whole(Reading(events, stream), log)
        assert server.requests("Resume")[0].cursors[0].count == 3


async def test_forgotten_streams_end() -> None:
    """A stream that its reader dropped must not live on: the server parks what nobody reads (R6)."""

    def sync() -> Client:
        client = Client(server.address)
        for _ in client.stream("a prompt"):
            break
        return client

    async with FakeServer(Log.of(TEXT)) as server:
        server.script.extend([after(3, silence), after(3, silence)])
        async with AsyncClient(server.address) as client:
            async for _ in client.stream("a prompt"):
                break
            await until(lambda: server.open_streams == 0 and len(server.calls) == 1)
        sync_client = await asyncio.to_thread(sync)
        await until(lambda: server.open_streams == 0 and len(server.calls) == 2)
        sync_client.close()
        assert server.requests("Cancel") == []


@pytest.mark.parametrize("act", [whole(chunk=4), whole(chunk=100)])
async def test_coalesced_messages(read: Read, act: Act) -> None:
    log = Log.of(TEXT)
    async with FakeServer(log) as server:
        server.script.append(act)
        check_whole(await read(server.address), log)
