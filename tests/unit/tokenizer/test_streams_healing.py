"""What happens to links and logs behind a stream, and what its reader must not see of it (R8, R9, R16)."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import Iterator

import grpc
import pytest

from fermata.running_hash import hash_ids
from fermata.v1 import common_pb2
from fermata.v1 import generation_pb2 as public
from services.common import failpoints, rpc
from services.common.errors import (
    Draining,
    GenerationNotFound,
    InternalError,
    LogDiverged,
    NeedFrom,
    NoOrchestrator,
    OwnerChanged,
    OwnerElsewhere,
    SessionStoreUnavailable,
    SlowReader,
)
from services.orchestrator.v1 import orchestrator_pb2 as pb
from services.tokenizer import attachment, link, orchestrators
from services.tokenizer.codec import Codec
from tests.unit.tokenizer.fake_orchestrator import FakeGeneration
from tests.unit.tokenizer.house import (
    TEXT,
    Received,
    error_of,
    house_of,
    only,
    read_some,
    slowly,
    until,
)


@pytest.mark.parametrize("break_after", [0, 1, 7, 30])
async def test_a_broken_link_is_attached_again_at_the_same_address(codec: Codec, break_after: int) -> None:
    output = codec.encode(TEXT)
    async with house_of(codec, [output], orchestrators=2) as house:
        for fake in house.orchestrators:
            fake.break_after = break_after
        received = await Received().read(house.stream())
        asked = [len(fake.attaches) for fake in house.orchestrators]
        attaches = [attach for fake in house.orchestrators for attach in fake.attaches]
    assert received.text == {0: TEXT}
    assert len(received.started) == 1
    assert sorted(asked) == [0, 2]
    assert attaches[1].name == pb.Name(tenant="default", generation_id=received.started[0].generation_id)
    (cursor,) = attaches[1].cursors
    assert cursor.running_hash == hash_ids(output[: cursor.count])
    assert cursor.count >= min(break_after, 1)


async def test_a_dead_orchestrator_is_replaced_by_another(codec: Codec) -> None:
    output = codec.encode(TEXT)
    async with house_of(codec, slowly(codec, output, 5), orchestrators=3) as house:
        received, call = Received(), house.stream()
        await read_some(received, call, 5)
        owner = next(fake for fake in house.orchestrators if fake.attaches)
        await owner.stop()
        only(house).log()
        await received.read(call)
    assert received.text == {0: TEXT}


async def test_a_log_that_lost_its_end_gets_it_back(codec: Codec) -> None:
    """R16: NEED_FROM, and the tokenizer still has the ids of its open call."""
    output = codec.encode(TEXT)
    async with house_of(codec, slowly(codec, output, 9), orchestrators=2) as house:
        received, call = Received(), house.stream()
        await read_some(received, call, 9)
        generation = only(house)
        generation.logged = [4]
        owner = next(fake for fake in house.orchestrators if fake.attaches)
        await owner.stop()
        other = next(fake for fake in house.orchestrators if fake is not owner)
        await until(lambda: len(other.attaches) == 2)
        assert generation.logged == [9]
        generation.log()
        await received.read(call)
        (tail,) = other.attaches[1].tails
    assert received.text == {0: TEXT}
    assert (tail.first_offset, list(tail.token_ids)) == (4, output[4:9])


async def test_what_a_resumed_reader_lacks_is_asked_of_the_client(codec: Codec) -> None:
    output = codec.encode(TEXT)
    async with house_of(codec, slowly(codec, output, 6)) as house:
        call = house.stream()
        received = Received()
        await read_some(received, call, 6)
        call.cancel()
        generation = only(house)
        generation.logged = [2]
        name = public.GenerationName(generation_id=generation.generation_id)
        cursor = common_pb2.Cursor(count=6, running_hash=hash_ids(output[:6]))
        request = public.ResumeRequest(generation=name, cursors=[cursor])
        error = await error_of(house.generation.Resume(request))
        assert isinstance(error, NeedFrom)
        assert error.metadata == {"choice": "0", "count": "2"}
        request.tails.add(choice=0, first_offset=2, token_ids=output[2:6])
        resumed, resuming = Received({0: 6}), house.generation.Resume(request)
        resumed.take((await anext(aiter(resuming))).event)
        # The same once more, in the middle of the call: now the tokenizer has the tail.
        generation.logged = [3]
        house.first.break_after = 0
        for stream in house.first.streams:
            stream.queue.put_nowait(None)
        await until(lambda: generation.logged == [6])
        house.first.break_after = -1
        generation.log()
        await resumed.read(resuming)
    assert resumed.ids == {0: output[6:]}
    assert len(house.first.attaches[-1].tails) == 1


async def test_a_log_that_never_has_enough_is_an_error(codec: Codec) -> None:
    output = codec.encode(TEXT)
    async with house_of(codec, slowly(codec, output, 5)) as house:
        received, call = Received(), house.stream()
        await read_some(received, call, 5)
        house.first.attach_errors = [NeedFrom("again", metadata={"choice": "0", "count": "3"})] * 1000
        for stream in house.first.streams:
            stream.queue.put_nowait(None)
        error = await error_of(call)
    assert isinstance(error, NeedFrom)
    assert len(house.first.attaches) < 50


async def test_a_reader_goes_to_the_owner(codec: Codec) -> None:
    """R9: OWNER_ELSEWHERE, at the beginning and in the middle."""
    output = codec.encode(TEXT)
    async with house_of(codec, slowly(codec, output, 5), orchestrators=2) as house:
        one, other = house.orchestrators
        call, received = house.stream(), Received()
        await read_some(received, call, 5)
        owner, stranger = (one, other) if one.attaches else (other, one)
        elsewhere = OwnerElsewhere("moved", metadata={"address": stranger.address})
        (stream,) = owner.streams
        ended = pb.ReaderEnded(reader=owner.attaches[0].reader, status=rpc.to_status(elsewhere))
        stream.pumps[1].cancel()
        stream.send(ended=[ended])
        await until(lambda: stranger.attaches)
        only(house).log()
        await received.read(call)
    assert received.text == {0: TEXT}
    assert stranger.attaches[0].cursors[0].count == 5


@pytest.mark.parametrize("error", [OwnerChanged("x"), Draining("x"), SlowReader("x")])
async def test_other_ends_are_attached_again(codec: Codec, error: Exception) -> None:
    output = codec.encode(TEXT)
    async with house_of(codec, slowly(codec, output, 5)) as house:
        received, call = Received(), house.stream()
        await read_some(received, call, 5)
        (stream,) = house.first.streams
        stream.pumps[1].cancel()
        stream.send(ended=[pb.ReaderEnded(reader=1, status=rpc.to_status(error))])  # type: ignore[arg-type]
        await until(lambda: len(house.first.attaches) == 2)
        only(house).log()
        await received.read(call)
    assert received.text == {0: TEXT}


async def test_a_store_that_is_away_for_a_moment_does_not_end_a_running_stream(codec: Codec) -> None:
    output = codec.encode(TEXT)
    away = SessionStoreUnavailable("away", retry_delay=1.0)
    async with house_of(codec, [output]) as house:
        house.first.break_after = 3
        house.first.attach_errors = []
        call, received = house.stream(), Received()
        await read_some(received, call, 1)
        house.first.attach_errors = [away, away]
        await received.read(call)
        assert received.text == {0: TEXT}
        house.first.attach_errors = [away]
        assert isinstance(await error_of(house.stream()), SessionStoreUnavailable)


async def test_a_second_started_only_with_another_fingerprint(codec: Codec) -> None:
    """R20."""
    output = codec.encode(TEXT)
    async with house_of(codec, slowly(codec, output, 5), orchestrators=1) as house:
        received, call = Received(), house.stream()
        await read_some(received, call, 5)
        generation = only(house)
        (stream,) = house.first.streams
        for weights in ("a", "a", "b", "b"):
            generation.fingerprint = common_pb2.Fingerprint(weights=weights)
            stream.send(attached=[pb.Attached(reader=1, opened=generation.opened())])
        generation.log()
        await received.read(call)
    assert [started.fingerprint.weights for started in received.started] == ["", "b"]
    assert received.text == {0: TEXT}


async def test_tokens_that_were_delivered_are_dropped_and_gaps_are_an_error(codec: Codec) -> None:
    output = codec.encode(TEXT)
    async with house_of(codec, slowly(codec, output, 5)) as house:
        received, call = Received(), house.stream()
        await read_some(received, call, 5)
        (stream,) = house.first.streams
        house.first.send_tokens(stream, 1, only(house), 2, 5)
        house.first.send_tokens(stream, 1, only(house), 3, 8)
        await read_some(received, call, 8)
        house.first.send_tokens(stream, 99, only(house), 0, 3)  # a reader that left
        house.first.send_tokens(stream, 1, only(house), 9, 10)
        error = await error_of(call)
    assert received.ids[0] == output[:8]
    assert isinstance(error, InternalError)


@pytest.mark.parametrize("error", [LogDiverged("other"), GenerationNotFound("none")])
async def test_what_a_reader_must_know_reaches_it(codec: Codec, error: Exception) -> None:
    async with house_of(codec, [codec.encode(TEXT)]) as house:
        house.first.attach_errors = [error]  # type: ignore[list-item]
        assert type(await error_of(house.stream())) is type(error)


async def test_nobody_there(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrators, "GIVE_UP_AFTER", 0.4)
    monkeypatch.setattr(attachment, "GIVE_UP_AFTER", 0.4)
    output = codec.encode(TEXT)
    async with house_of(codec, slowly(codec, output, 5)) as house:
        received, call = Received(), house.stream()
        await read_some(received, call, 5)
        await house.first.stop()
        error = await error_of(call)
        assert isinstance(error, NoOrchestrator)
        assert error.retry_delay == 1.0
        assert isinstance(await error_of(house.stream()), NoOrchestrator)


async def test_an_orchestrator_that_comes_back_is_found_again(codec: Codec) -> None:
    output = codec.encode(TEXT)
    async with house_of(codec, slowly(codec, output, 5)) as house:
        received, call = Received(), house.stream()
        await read_some(received, call, 5)
        port = int(house.first.address.rpartition(":")[2])
        await house.first.stop()
        await asyncio.sleep(0.3)
        await house.first.start(port)
        only(house).log()
        await received.read(call)
    assert received.text == {0: TEXT}


async def test_a_silent_link_is_dead(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "SILENCE_LIMIT", 1.0)
    output = codec.encode(TEXT)
    async with house_of(codec, slowly(codec, output, 5), orchestrators=2) as house:
        received, call = Received(), house.stream()
        await read_some(received, call, 5)
        owner = next(fake for fake in house.orchestrators if fake.attaches)
        other = next(fake for fake in house.orchestrators if fake is not owner)
        owner.mute = True
        await until(lambda: other.attaches)
        only(house).log()
        await received.read(call)
    assert received.text == {0: TEXT}


async def test_opening_is_tried_elsewhere_under_the_same_name(codec: Codec) -> None:
    """A reply that was lost: the second orchestrator finds the first one's generation."""
    async with house_of(codec, [codec.encode("x")], orchestrators=3) as house:
        lost = itertools.count()

        def plan(request: pb.OpenRequest, generation_id: str) -> FakeGeneration:
            generation = FakeGeneration(generation_id, request, [codec.encode("x")], codec.vocabulary)
            generation.log()
            return generation

        house.log.plan = plan
        for fake in house.orchestrators:
            original = fake.Open

            async def open_and_lose(
                request: pb.OpenRequest, context: rpc.Context, original: object = original
            ) -> pb.OpenResponse:
                response = await original(request, context)  # type: ignore[operator]
                if next(lost) < 2:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
                return response  # type: ignore[no-any-return]

            fake.Open = open_and_lose  # type: ignore[method-assign]
            await fake.stop()
            await fake.start(int(fake.address.rpartition(":")[2]))
        received = await Received().read(house.stream())
        assert sum(fake.calls.count("Open") for fake in house.orchestrators) == 3
        assert len(house.log.generations) == 1
    assert received.text == {0: "x"}


async def test_failpoints_around_opening(codec: Codec) -> None:
    async with house_of(codec, [codec.encode("x")]) as house:
        for name, opened in (
            ("tokenizer.open.before", 0),
            ("tokenizer.open.after", 1),
            ("tokenizer.event.before_write", 2),
        ):
            failpoints.configure({"FERMATA_FAILPOINTS": f"{name}:raise"}, testing=True)
            try:
                assert isinstance(await error_of(house.stream()), InternalError)
            finally:
                failpoints.configure({}, testing=False)
            assert len(house.log.generations) == opened


async def test_the_planted_bug_loses_a_token(codec: Codec) -> None:
    """A checker must see it, so it must be visible: the reader's own check of offsets fails."""
    output = codec.encode(TEXT)
    async with house_of(codec, [output]) as house:
        house.first.break_after = 5
        failpoints.configure({"FERMATA_PLANT": "resume_off_by_one"}, testing=True)
        try:
            with pytest.raises(AssertionError, match="gapless"):
                await Received().read(house.stream())
        finally:
            failpoints.configure({}, testing=False)


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """What is left behind stays visible."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
async def test_broken_links_leave_nothing_behind(codec: Codec) -> None:
    """gRPC goes on asking for requests when the other side has ended a stream."""
    async with house_of(codec, slowly(codec, codec.encode(TEXT), 5)) as house:
        received, call = Received(), house.stream()
        await read_some(received, call, 5)
        before = len(asyncio.all_tasks())
        for rounds in range(1, 6):
            for stream in house.first.streams:
                stream.queue.put_nowait(None)
            await until(lambda rounds=rounds: len(house.first.attaches) > rounds)  # type: ignore[misc]
        await until(lambda: len(asyncio.all_tasks()) <= before)
        only(house).log()
        await received.read(call)
    assert received.text == {0: TEXT}
