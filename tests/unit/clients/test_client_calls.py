"""The unary calls, sync and async: values out, retries over broken links, dials that race (R18)."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeAlias

import grpc
import pytest

import fermata
from fermata import AsyncClient, Client, FinishReason, GenerationState, SessionState
from fermata.aio_links import Links as AsyncLinks
from fermata.errors import (
    DeadlineExceeded,
    FermataError,
    GenerationNotFound,
    Internal,
    NoOrchestrator,
    Overloaded,
    Unavailable,
)
from fermata.links import Links
from fermata.resume import Endpoint
from services.common import errors as server_errors
from tests.unit.clients.fake_server import GENERATION_ID, SESSION_ID, FakeServer, Log, after, refused, silence
from tests.unit.clients.proxy import Proxy

TEXT = "the quick brown fox"
Call: TypeAlias = Callable[..., Awaitable[Any]]


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer(Log.of(TEXT, "one two", rest="!")) as server:
        yield server


@pytest.fixture(params=["async", "sync"])
def call(request: pytest.FixtureRequest) -> Call:
    """Calls a method of one of the two clients: `await call(address, "tokenize", "text")`."""

    async def asynchronous(address: str, method: str, *arguments: Any, **options: Any) -> Any:
        async with AsyncClient(address, give_up_after=1.5) as client:
            return await getattr(client, method)(*arguments, **options)

    def sync(address: str, method: str, *arguments: Any, **options: Any) -> Any:
        with Client(address, give_up_after=1.5) as client:
            return getattr(client, method)(*arguments, **options)

    if request.param == "async":
        return asynchronous
    return lambda *arguments, **options: asyncio.to_thread(sync, *arguments, **options)


def test_both_clients_offer_the_same() -> None:
    def signatures(kind: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(method).parameters) for name, method in methods if name[0] != "_"}

    assert signatures(Client) == signatures(AsyncClient)
    assert all(hasattr(fermata, name) for name in fermata.__all__)


async def test_generate_returns_the_whole(server: FakeServer, call: Call) -> None:
    generation = await call(server.address, "generate", "a prompt", n=2)
    assert (generation.generation_id, generation.session_id, generation.seed) == (GENERATION_ID, SESSION_ID, 7)
    assert generation.text == server.log.texts[0]
    assert [choice.text for choice in generation.choices] == server.log.texts
    assert generation.token_ids == tuple(server.log.token_ids(0))
    assert generation.finish_reasons == (FinishReason.MAX_TOKENS,) * 2
    assert (generation.usage.prompt_tokens, generation.usage.output_tokens, generation.usage.cached_tokens) == (3, 6, 1)
    assert [name for name, _ in server.calls] == ["StreamGenerate"]


async def test_generate_heals_and_fails_like_a_stream(server: FakeServer, call: Call) -> None:
    server.script.append(after(2, server_errors.OwnerChanged("moved")))
    assert (await call(server.address, "generate", "a prompt", n=2)).text == server.log.texts[0]
    server.script.append(after(2, silence))
    with pytest.raises(DeadlineExceeded) as caught:
        await call(server.address, "generate", "a prompt", timeout=0.3)
    assert caught.value.generation_id == GENERATION_ID
    assert server.requests("Cancel") == [], "a deadline ends the reading, not the generation (R6)"
    server.script.append(refused(server_errors.Overloaded("full", retry_delay=3.0)))
    with pytest.raises(Overloaded):
        await call(server.address, "generate", "a prompt")


async def test_generate_raises_when_all_choices_failed(server: FakeServer, call: Call) -> None:
    async def act(feed: Any, failing: int) -> Any:
        events = [feed.started(), *feed.tokens(), *feed.finished()]
        for event in events[len(events) - failing :]:
            event.finished.finish_reason = FinishReason.ERROR
            event.finished.error.code = grpc.StatusCode.INTERNAL.value[0]
            event.finished.error.message = "not a number"
        for event in events:
            yield event

    server.script.append(lambda feed: act(feed, 1))
    generation = await call(server.address, "generate", "a prompt", n=2)
    assert [choice.error is None for choice in generation.choices] == [True, False]
    server.script.append(lambda feed: act(feed, 2))
    with pytest.raises(Internal, match="not a number"):
        await call(server.address, "generate", "a prompt", n=2)


async def test_cancelling_the_task_cancels_the_generation(server: FakeServer) -> None:
    server.script.append(after(2, silence))
    async with AsyncClient(server.address) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.generate("a prompt")
        assert len(server.requests("Cancel")) == 1


async def test_cancel(server: FakeServer, call: Call) -> None:
    (finished,) = await call(server.address, "cancel", GENERATION_ID)
    assert (finished.finish_reason, finished.count) == (FinishReason.CANCELLED, 2)
    await call(server.address, "cancel", request_id="mine", session_id=SESSION_ID)
    first, second = (request.generation for request in server.requests("Cancel"))
    assert first.generation_id == GENERATION_ID
    assert (second.request_id, second.session_id) == ("mine", SESSION_ID)


async def test_get_generation(server: FakeServer, call: Call) -> None:
    stored = await call(server.address, "get_generation", GENERATION_ID)
    assert stored.state is GenerationState.PARKED
    assert stored.started.generation_id == GENERATION_ID
    assert [choice.text for choice in stored.choices] == server.log.texts
    assert [choice.finish_reason for choice in stored.choices] == [FinishReason.UNSPECIFIED] * 2
    assert stored.choices[0].usage.output_tokens == 4
    assert stored.create_time == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    with pytest.raises(GenerationNotFound):
        await call(server.address, "get_generation", "another")


async def test_sessions(server: FakeServer, call: Call) -> None:
    session = await call(server.address, "get_session", "mine")
    assert (session.session_id, session.state, session.labels) == ("mine", SessionState.IDLE, {"team": "blue"})
    assert session.generations[0].finish_reasons == (FinishReason.MAX_TOKENS,)
    assert session.expire_time is None
    names = [session.session_id for session in await call(server.address, "list_sessions")]
    assert names == [f"session{index}" for index in range(6)]
    assert len(await call(server.address, "list_sessions", limit=3)) == 3
    assert [request.page_token for request in server.requests("ListSessions")] == ["", "1", "2", "", "1"]


async def test_text(server: FakeServer, call: Call) -> None:
    pieces = await call(server.address, "tokenize", "hello", parse_special=True)
    assert [(piece.token_id, piece.piece, piece.special) for piece in pieces] == [
        (100, b"hel", False),
        (101, b"lo", False),
        (2, b"<end>", True),
    ]
    assert await call(server.address, "detokenize", [4, 5]) == "4 5"
    rendered = await call(server.address, "apply_chat_template", [{"role": "user", "content": "hi"}])
    assert (rendered.prompt, rendered.token_ids) == ("hi", (1, 2, 3))
    (model,) = await call(server.address, "models")
    assert (model.name, model.vocabulary_size, model.context_length) == ("fake", 50_000, 1024)
    assert (model.special_tokens, model.eos_token_ids, model.fingerprint) == ({2: "<end>"}, (2,), None)


async def test_calls_are_repeated_over_broken_links(server: FakeServer, call: Call) -> None:
    async with Proxy(server) as proxy:
        server.failures.append(server_errors.NoOrchestrator("nobody", retry_delay=0.01))
        assert await call(proxy.address, "detokenize", [1]) == "1"
    assert len(server.requests("Detokenize")) == 2
    server.failures.append(server_errors.InternalError("a bug"))
    with pytest.raises(Internal):
        await call(server.address, "detokenize", [1])


async def test_calls_give_up_and_end_at_their_timeout(call: Call) -> None:
    for timeout, kind in ((None, Unavailable), (0.2, DeadlineExceeded)):
        begin = time.monotonic()
        with pytest.raises(kind):
            await call("127.0.0.1:1", "models", timeout=timeout)
        assert time.monotonic() - begin < 4.0


async def test_errors_of_the_server_are_kept_while_it_is_asked_again(call: Call) -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        server.failures.extend(server_errors.NoOrchestrator("nobody", retry_delay=0.6) for _ in range(9))
        with pytest.raises(NoOrchestrator) as caught:
            await call(server.address, "models")
        assert caught.value.retry_delay == 0.6
        assert len(server.requests("ListModels")) == 3


async def race(kind: str, endpoints: list[Endpoint], **options: Any) -> Endpoint:
    if kind == "async":
        links = AsyncLinks("127.0.0.1:1", 1.0)
        try:
            return (await links.race(endpoints, **options)).endpoint
        finally:
            await links.close()

    def in_thread() -> Endpoint:
        links = Links("127.0.0.1:1", 1.0)
        try:
            return links.race(endpoints, **options).endpoint
        finally:
            links.close()

    return await asyncio.to_thread(in_thread)


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_first_that_answers_wins(kind: str) -> None:
    """One process of two is stopped: a dial to it hangs, the other dial answers at once (R18)."""
    async with FakeServer(Log.of(TEXT)) as server, Proxy(server) as hanging:
        await hanging.freeze()
        begin = time.monotonic()
        places = [Endpoint(hanging.address, 0), Endpoint("127.0.0.1:1", 0), Endpoint(server.address, 0)]
        assert await race(kind, places) == places[2]
        assert time.monotonic() - begin < 0.9
        begin = time.monotonic()
        with pytest.raises(Unavailable, match=hanging.address):
            await race(kind, places[:2])
        assert 0.8 < time.monotonic() - begin < 2.5


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_not_serving_is_the_last_resort(kind: str) -> None:
    async with FakeServer(Log.of(TEXT)) as leaving, FakeServer(Log.of(TEXT)) as staying:
        await leaving.serve(False)
        places = [Endpoint(leaving.address, 0), Endpoint("127.0.0.1:1", 0), Endpoint(staying.address, 0)]
        assert await race(kind, places) == places[2]
        assert await race(kind, places[:2]) == places[0]
        with pytest.raises(Unavailable):
            await race(kind, places[:2], serving_only=True)


async def test_waiting_for_a_server(call: Call) -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        await server.serve(False)
        with pytest.raises(FermataError):
            await call(server.address, "wait_until_ready", 0.3)
        waiting = asyncio.ensure_future(call(server.address, "wait_until_ready", 5.0))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await server.serve(True)
        await waiting
