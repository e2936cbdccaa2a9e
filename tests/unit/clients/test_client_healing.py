"""Interruptions that a stream heals and those that it tells, sync and async (P1, P7, R4, R16, R18)."""

from __future__ import annotations

from typing import Any, Literal

import grpc
import pytest

from fermata import Started
from fermata.errors import (
    CursorOutOfRange,
    DataLoss,
    FermataError,
    Internal,
    InvalidRequest,
    LogDiverged,
    NeedFrom,
    Overloaded,
)
from services.common import errors as server_errors
from tests.unit.clients.collecting import TEXT, WORDS, Read, check_whole
from tests.unit.clients.fake_server import (
    GENERATION_ID,
    FakeServer,
    Feed,
    Log,
    Status,
    after,
    early_end,
    refused,
)
from tests.unit.clients.proxy import Proxy


@pytest.mark.parametrize("offset", range(WORDS + 1))
async def test_link_cut_at_every_offset(read: Read, offset: int) -> None:
    log = Log.of(TEXT, rest="?")
    async with FakeServer(log) as server, Proxy(server) as proxy:
        server.script.append(after(offset, proxy.cut))
        reading = await read(proxy.address)
    check_whole(reading, log)
    # On a busy machine a cut may overtake what was sent last; the server is told exactly what came.
    for cursor in (cursor for request in server.requests("Resume") for cursor in request.cursors):
        assert cursor.count <= offset
        assert cursor.running_hash == log.hash(0, cursor.count)


async def test_many_cuts_and_choices(read: Read) -> None:
    log = Log.of(TEXT, "one two three", "a b c d e f g", rest=".")
    async with FakeServer(log) as server, Proxy(server) as proxy:
        server.script.extend(after(messages, proxy.cut) for messages in (3, 1, 4, 1, 5))
        reading = await read(proxy.address, n=3)
    check_whole(reading, log)
    assert reading.stream.texts == log.texts
    assert len(server.requests("Resume")) == 5
    assert [choice.text for choice in reading.stream.result().choices] == log.texts


@pytest.mark.parametrize(
    "error",
    [
        Status(grpc.StatusCode.UNAVAILABLE),
        Status(grpc.StatusCode.CANCELLED),
        Status(grpc.StatusCode.INTERNAL, "RST_STREAM"),
        server_errors.OwnerChanged("another owns it"),
        server_errors.SlowReader("too slow"),
        server_errors.Draining("leaving"),
        server_errors.NoShard("no shard", retry_delay=0.01),
        server_errors.NoOrchestrator("no orchestrator", retry_delay=0.01),
        server_errors.SessionStoreUnavailable("no store", retry_delay=0.01),
    ],
    ids=repr,
)
async def test_these_failures_are_healed(read: Read, error: Exception) -> None:
    log = Log.of(TEXT)
    async with FakeServer(log) as server:
        server.script.extend([refused(error), after(2, error), refused(error), after(3, error)])
        reading = await read(server.address)
    check_whole(reading, log)
    generated = server.requests("StreamGenerate")
    assert len(generated) == 2
    assert generated[0].generation.request_id == generated[1].generation.request_id != ""
    assert [request.generation.generation_id for request in server.requests("Resume")] == [GENERATION_ID] * 3
    assert [cursor.count for request in server.requests("Resume") for cursor in request.cursors] == [2, 2, 5]


@pytest.mark.parametrize("messages", [0, 2])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (server_errors.InternalError("a bug", metadata={"error_id": "1"}), Internal),
        (server_errors.LogDiverged("not yours", metadata={"choice": "0", "count": "1"}), LogDiverged),
        (server_errors.CursorOutOfRange("behind the end"), CursorOutOfRange),
        (Status(grpc.StatusCode.UNIMPLEMENTED), FermataError),
    ],
    ids=repr,
)
async def test_these_failures_are_told(
    read: Read, error: Exception, expected: type[FermataError], messages: int
) -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        server.script.append(after(messages, error))
        with pytest.raises(expected) as caught:
            await read(server.address)
        assert caught.value.generation_id == GENERATION_ID
        assert len(server.calls) == 1, "neither resumed nor cancelled"


async def test_refusal_has_the_fields(read: Read) -> None:
    violation = server_errors.FieldViolation("generation.sampling.top_p", "must be within (0, 1]")
    async with FakeServer(Log.of(TEXT)) as server:
        server.script.append(refused(server_errors.InvalidRequest("bad request", violations=[violation])))
        with pytest.raises(InvalidRequest) as caught:
            await read(server.address, top_p=2.0)
    assert caught.value.violations == (("generation.sampling.top_p", "must be within (0, 1]"),)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_overload_is_told_at_first_and_waited_for_later(read: Read) -> None:
    log = Log.of(TEXT)
    error = server_errors.Overloaded("full", retry_delay=0.05)
    async with FakeServer(log) as server:
        server.script.append(refused(error))
        with pytest.raises(Overloaded) as caught:
            await read(server.address)
        assert caught.value.retry_delay == pytest.approx(0.05)
        server.script.extend([after(2, Status(grpc.StatusCode.UNAVAILABLE)), refused(error)])
        check_whole(await read(server.address), log)


async def test_ok_before_the_end_is_a_broken_link(read: Read) -> None:
    log = Log.of(TEXT)
    async with FakeServer(log) as server:
        server.script.append(after(4, early_end))
        check_whole(await read(server.address), log)
        assert len(server.requests("Resume")) == 1


async def test_break_between_two_ends(read: Read) -> None:
    log = Log.of("one two", "three four", rest="!")

    async def act(feed: Feed) -> Any:
        for event in [feed.started(), *feed.tokens(), feed.finished()[1]]:
            yield event
        raise Status(grpc.StatusCode.UNAVAILABLE)

    async with FakeServer(log) as server:
        server.script.append(act)
        reading = await read(server.address, n=2)
    check_whole(reading, log)
    assert [cursor.count for cursor in server.requests("Resume")[0].cursors] == [2, 2]


async def test_lost_status_after_the_last_event_does_not_matter(read: Read) -> None:
    log = Log.of(TEXT)

    async def act(feed: Feed) -> Any:
        for event in [feed.started(), *feed.tokens(), *feed.finished()]:
            yield event
        raise Status(grpc.StatusCode.UNAVAILABLE)

    async with FakeServer(log) as server:
        server.script.append(act)
        check_whole(await read(server.address), log)
        assert [name for name, _ in server.calls] == ["StreamGenerate"]


async def test_need_from_gets_the_tail(read: Read) -> None:
    log = Log.of(TEXT, "one two three four five")
    lost = server_errors.NeedFrom("the log is shorter", metadata={"choice": "1", "count": "1"})
    both = server_errors.NeedFrom("the log is shorter", metadata={"choice": "0", "count": "0"})
    async with FakeServer(log) as server:
        server.script.extend([after(6, Status(grpc.StatusCode.UNAVAILABLE)), refused(lost), refused(both)])
        reading = await read(server.address, n=2)
    check_whole(reading, log)
    first, second, third = server.requests("Resume")
    assert not first.tails
    assert [(tail.choice, tail.first_offset, list(tail.token_ids)) for tail in second.tails] == [
        (1, 1, log.token_ids(1)[1:3])
    ]
    assert [(tail.choice, tail.first_offset, list(tail.token_ids)) for tail in third.tails] == [
        (0, 0, log.token_ids(0)[:3]),
        (1, 1, log.token_ids(1)[1:3]),
    ]


async def test_need_from_without_ids_is_told(read: Read) -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        server.script.append(refused(server_errors.NeedFrom("shorter", metadata={"choice": "0", "count": "2"})))
        with pytest.raises(NeedFrom):
            await read(server.address, resume=True, cursors={0: 4})


async def test_need_from_for_ever_gives_up(read: Read) -> None:
    lost = server_errors.NeedFrom("the log is shorter", metadata={"choice": "0", "count": "1"})
    async with FakeServer(Log.of(TEXT)) as server:
        server.script.append(after(3, Status(grpc.StatusCode.UNAVAILABLE)))
        server.script.extend(refused(lost) for _ in range(200))
        with pytest.raises(NeedFrom):
            await read(server.address, give_up_after=0.3)
        assert len(server.requests("Resume")) < 20, "it backs off"


@pytest.mark.parametrize("where", ["tokens", "finished"])
async def test_wrong_hash_is_data_loss(read: Read, where: Literal["tokens", "finished"]) -> None:
    async def act(feed: Feed) -> Any:
        for event in [feed.started(), *feed.tokens(), *feed.finished()]:
            part = getattr(event, where)
            if event.HasField(where) and getattr(part, "first_offset", 3) == 3:
                part.running_hash = b"badbadba"
            yield event

    async with FakeServer(Log.of(TEXT)) as server:
        server.script.append(act)
        with pytest.raises(DataLoss) as caught:
            await read(server.address)
    assert isinstance(caught.value, LogDiverged)
    assert caught.value.metadata["choice"] == "0"
    assert len(server.calls) == 1


async def test_log_that_changed_is_data_loss(read: Read) -> None:
    """The log behind a resume has other tokens than were delivered (P2): never shown as one text."""
    log = Log.of(TEXT)
    async with FakeServer(log) as server:

        async def rewrite(feed: Feed) -> None:
            server.log = Log.of("another text altogether that is no continuation of it at all")
            raise Status(grpc.StatusCode.UNAVAILABLE)

        server.script.append(after(4, rewrite))
        with pytest.raises(DataLoss):
            await read(server.address)


async def test_repeated_tokens_are_dropped_and_gaps_resumed(read: Read) -> None:
    log = Log.of(TEXT)

    async def repeats(feed: Feed) -> Any:
        tokens = feed.tokens()
        for event in [feed.started(), *tokens[:3], *tokens[1:4], *tokens[5:]]:
            yield event

    async def overlaps(feed: Feed) -> Any:
        feed.counts[0] -= 1
        feed.chunk = 3
        for event in [feed.started(), *feed.tokens()]:
            yield event

    async with FakeServer(log) as server:
        server.script.extend([repeats, overlaps])
        check_whole(await read(server.address), log)
        assert [request.cursors[0].count for request in server.requests("Resume")] == [4, 4]


async def test_another_fingerprint_is_told_once(read: Read) -> None:
    log = Log.of(TEXT)

    async def moved(feed: Feed) -> Any:
        feed.log.fingerprint = "other weights"
        for event in [feed.started(), *feed.tokens(2), feed.started(), *feed.tokens(), *feed.finished()]:
            yield event

    async with FakeServer(log) as server:
        server.script.extend([after(2, Status(grpc.StatusCode.UNAVAILABLE)), moved])
        reading = await read(server.address)
    started = [event for event in reading.events if isinstance(event, Started)]
    assert [event.fingerprint.weights for event in started if event.fingerprint] == ["weights", "other weights"]
    assert reading.token_ids == log.token_ids()


async def test_end_without_the_tokens_before_it_is_not_believed(read: Read) -> None:
    log = Log.of(TEXT)

    async def act(feed: Feed) -> Any:
        for event in [feed.started(), *feed.finished()]:
            yield event

    async with FakeServer(log) as server:
        server.script.append(act)
        check_whole(await read(server.address), log)
