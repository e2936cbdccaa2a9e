"""`clients/RESUME.md` by raw stubs: what a log can lose, and what breaks under a reader."""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
import time
from typing import Any

import grpc
import pytest
from grpc import aio

from fermata.v1 import common_pb2
from fermata.v1 import generation_pb2 as pb
from fermata.v1.generation_pb2_grpc import GenerationServiceStub
from services.common import failpoints
from tests.contract.raw_reader import Choice, RawReader
from tests.contract.requests import (
    eventually,
    has,
    honest,
    new_request,
    own_ids,
    parked_log,
    refusal,
    same,
    total,
    undisturbed,
)
from tests.pipeline.house import House

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]

LENGTH = 120


async def parked(house: House) -> tuple[pb.GenerationName, list[int], pb.GenerateResponse]:
    """A generation that rests in the middle: its name, its log, and what it would have become."""
    request = new_request(max_tokens=LENGTH)
    expected = await undisturbed(house, request)
    reader = RawReader(house.address, request=own_ids(request))
    await reader.call(house.address, functools.partial(has, 10))
    assert reader.name is not None
    log = await parked_log(house, reader.name)
    assert 10 <= len(log) < LENGTH - 20
    assert log == expected.choices[0].token_ids[: len(log)]
    return reader.name, log, expected


def held(after: int) -> threading.Event:
    """Lets the shard stand still after so many steps, until the event is set."""
    event = threading.Event()
    failpoints.on("shard.step.before_publish", functools.partial(event.wait, 30), count=after)
    return event


def tail(token_ids: list[int], first_offset: int) -> common_pb2.Tail:
    return common_pb2.Tail(choice=0, first_offset=first_offset, token_ids=token_ids[first_offset:])


async def test_a_log_that_is_shorter_than_the_reader(house: House) -> None:
    """R16: NEED_FROM, tails that do not fit, the tail that does; the reader holds more than was ever written."""
    name, log, expected = await parked(house)
    whole = list(expected.choices[0].token_ids)
    had = whole[: len(log) + 15]
    plain = pb.ResumeRequest(generation=name, cursors=[honest(0, had)])
    for _ in range(2):
        code, info = await refusal(house, plain)
        assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NEED_FROM")
        assert dict(info.metadata) == {"choice": "0", "count": str(len(log))}
    lie = [*had[:-1], had[-1] ^ 1]
    unchecked = common_pb2.Cursor(choice=0, count=len(had))
    for cursor, given in (
        (honest(0, had), tail(lie, len(log))),  # not what the hash says
        (honest(0, had), tail(had, len(log) + 1)),  # does not reach down to the log
        (unchecked, tail(had, len(log))),  # nothing to hold it against
    ):
        code, info = await refusal(house, pb.ResumeRequest(generation=name, cursors=[cursor], tails=[given]))
        assert (code, info.reason) == (grpc.StatusCode.DATA_LOSS, "LOG_DIVERGED")
        assert dict(info.metadata) == {"choice": "0", "count": str(len(log))}
    reader = RawReader(house.address, name=name)
    reader.choices[0].append(had)
    await reader.read()
    assert reader.answers == ["NEED_FROM"]
    assert reader.choices[0].token_ids == whole
    same(await RawReader(house.address, name=name).read(), expected)


@pytest.mark.parametrize("kept", ["more than is asked for", "everything", "nothing"])
async def test_what_a_reader_can_give_back(house: House, kept: str) -> None:
    name, log, expected = await parked(house)
    whole = list(expected.choices[0].token_ids)
    reader = RawReader(house.address, name=name)
    if kept == "nothing":  # resumes from the log's count: the same tokens are drawn again
        reader.choices[0].append(log)
    else:
        had = whole if kept == "everything" else whole[: len(log) + 15]
        request = pb.ResumeRequest(generation=name, cursors=[honest(0, had)], tails=[tail(had, 0)])
        async with aio.insecure_channel(house.address) as channel:
            call: Any = GenerationServiceStub(channel).Resume(request)
            assert (await call.read()).event.WhichOneof("event") == "started"
            if kept == "everything":  # the tail completes it: only the end is left to tell
                assert (await call.read()).event.finished.count == LENGTH
                assert await call.read() is aio.EOF
            again: Any = GenerationServiceStub(channel).Resume(request)  # a tail that is not needed any more
            assert (await again.read()).event.WhichOneof("event") == "started"
        reader.choices[0].append(had)
    await reader.read()
    assert reader.answers == []
    assert reader.choices[0].token_ids == whole
    same(await RawReader(house.address, name=name).read(), expected)


async def test_a_tail_beyond_the_end(house: House) -> None:
    """A log never grows beyond what the request allows, whoever asks."""
    name, log, expected = await parked(house)
    had = [*expected.choices[0].token_ids, 7, 8]
    request = pb.ResumeRequest(generation=name, cursors=[honest(0, had)], tails=[tail(had, len(log))])
    code, info = await refusal(house, request)
    assert (code, info.reason) == (grpc.StatusCode.OUT_OF_RANGE, "CURSOR_OUT_OF_RANGE")
    same(await RawReader(house.address, name=name).read(), expected)


async def test_an_owner_that_dies_with_what_was_not_written(house: House) -> None:
    """R15, R16: ASYNC; the store stands still, the reader goes on, then the owner and the store are killed."""
    request = new_request(n=3, max_tokens=LENGTH)
    expected = await undisturbed(house, request)
    reader = RawReader(house.address, request=own_ids(request))
    reading = asyncio.create_task(reader.read())
    await eventually(lambda: total(reader) >= 30)
    house.store.freeze()
    frozen = total(reader)
    await eventually(lambda: total(reader) >= frozen + 90)
    reading.cancel()
    await asyncio.wait([reading])
    await house.drop_owner()
    # Killed without a thaw: what waits in its sockets is lost too.
    house.store.process.kill()
    await asyncio.to_thread(house.store.process.wait)
    await asyncio.to_thread(house.store.restart)
    assert any(choice.count > reader.durable[index] for index, choice in reader.choices.items())
    await reader.read()
    same(reader, expected)
    assert reader.answers.count("NEED_FROM") == 3
    same(await RawReader(house.address, name=reader.name).read(), expected)


async def test_a_committed_token_is_never_lost(house: House) -> None:
    """R15: the same with COMMITTED; what the store does not have the reader never saw, so nothing is asked for."""
    request = new_request(n=2, max_tokens=LENGTH)
    request.durability = common_pb2.DURABILITY_COMMITTED
    expected = await undisturbed(house, request)
    reader = RawReader(house.address, request=own_ids(request))
    reading = asyncio.create_task(reader.read())
    await eventually(lambda: total(reader) >= 30)
    house.store.freeze()
    await asyncio.sleep(0.2)
    assert not reader.complete
    reading.cancel()
    await asyncio.wait([reading])
    await house.drop_owner()
    house.store.process.kill()
    await asyncio.to_thread(house.store.process.wait)
    await asyncio.to_thread(house.store.restart)
    assert all(choice.count <= reader.durable[index] for index, choice in reader.choices.items())
    await reader.read()
    same(reader, expected)
    assert "NEED_FROM" not in reader.answers


async def test_heartbeats_while_nothing_is_said(house: House) -> None:
    """R7, R18: the shard is gone; the stream says each second that it is alive, and goes on when a shard is there."""
    request = new_request(max_tokens=LENGTH)
    expected = await undisturbed(house, request)
    reader = RawReader(house.address, request=own_ids(request))
    reading = asyncio.create_task(reader.read())
    await eventually(lambda: total(reader) >= 20)
    await house.drop_shard()
    silent_since, seen = time.monotonic(), total(reader)
    reader.endpoints = []
    await eventually(lambda: reader.events.count("heartbeat") >= 2)
    assert 1.5 < time.monotonic() - silent_since < 3.5
    assert total(reader) < seen + 40  # no more than was on its way
    assert reader.endpoints == [f"127.0.0.1:{house.ports[f'tokenizer {index}']}" for index in range(2)]
    await house.start_shard()
    same(await reading, expected)
    assert reader.spoke == [house.address]
    assert reader.events.count("started") == 1


async def test_a_tokenizer_that_leaves(house: House) -> None:
    """R19: its streams are told, and go on at another endpoint."""
    request = new_request(n=2, max_tokens=LENGTH)
    expected = await undisturbed(house, request)
    reader = RawReader(house.address, request=own_ids(request))
    reading = asyncio.create_task(reader.read())
    await eventually(lambda: total(reader) >= 20)
    leaving = house.tokenizers[0]
    assert leaving is not None
    try:
        await leaving.drain()
        same(await reading, expected)
    finally:
        await house.drop_tokenizer(0)
    assert reader.answers == ["about to leave"]
    assert reader.spoke == [f"127.0.0.1:{house.ports[f'tokenizer {index}']}" for index in range(2)]


async def test_servers_that_die_under_a_reader(house: House) -> None:
    """Both tokenizers and the owner, one after the other; a reader by the page sees the undisturbed run."""
    request = new_request(n=3, max_tokens=LENGTH)
    expected = await undisturbed(house, request)
    reader = RawReader(house.address, request=own_ids(request))
    reading = asyncio.create_task(reader.read())
    await eventually(lambda: total(reader) >= 20)
    first = held(after=1)  # a generation that ends while servers come and go would not be interrupted
    await house.drop_tokenizer(0)
    await eventually(lambda: len(reader.spoke) == 2)
    second = held(after=30)
    first.set()
    await eventually(lambda: total(reader) >= 100)
    await house.drop_owner()
    await house.start_tokenizer(0)
    third = held(after=40)
    second.set()
    await eventually(lambda: total(reader) >= 180)
    await house.drop_tokenizer(1)
    third.set()
    same(await reading, expected)
    homes = [f"127.0.0.1:{house.ports[f'tokenizer {index}']}" for index in (0, 1, 0)]
    assert [address for address, _ in itertools.groupby(reader.spoke)] == homes
    assert "LOG_DIVERGED" not in reader.answers


async def test_a_program_that_lost_everything_but_its_cursors(house: House) -> None:
    """Counts and hashes alone: the rest comes, nothing comes twice."""
    request = own_ids(new_request(n=2, max_tokens=LENGTH))
    expected = await undisturbed(house, new_request(n=2, max_tokens=LENGTH))
    first = RawReader(house.address, request=request)
    await first.call(house.address, functools.partial(has, 60))
    cursors = [honest(index, choice.token_ids) for index, choice in first.choices.items()]
    async with aio.insecure_channel(house.address) as channel:
        call = GenerationServiceStub(channel).Resume(pb.ResumeRequest(generation=first.name, cursors=cursors))
        rest: dict[int, Choice] = {index: Choice() for index in range(2)}
        async for response in call:
            tokens = response.event.tokens
            rest[tokens.choice].token_ids += tokens.token_ids
    for choice in expected.choices:
        had = first.choices[choice.choice].token_ids
        assert had + rest[choice.choice].token_ids == choice.token_ids
