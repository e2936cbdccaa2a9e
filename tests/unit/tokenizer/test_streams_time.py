"""Streams and time: heartbeats, slow readers, readers that leave, draining (R5, R6, R7, R19)."""

from __future__ import annotations

import asyncio
import time

import pytest
from grpc import aio

from fermata.running_hash import hash_ids
from fermata.v1 import common_pb2
from fermata.v1 import generation_pb2 as public
from services.common import rpc
from services.common.errors import (
    Draining,
    SlowReader,
)
from services.common.tracing import unpack
from services.tokenizer import reader
from services.tokenizer.codec import Codec
from tests.unit.tokenizer.house import (
    SMALL_WINDOW,
    TEXT,
    Received,
    error_of,
    house_of,
    in_big_messages,
    only,
    read_some,
    slowly,
    until,
)


async def test_silence_is_spoken(codec: Codec) -> None:
    """R7, R18."""
    output = codec.encode(TEXT)
    async with house_of(codec, slowly(codec, output, 5), endpoints=("other:1",)) as house:
        received, call = Received(), house.stream()
        await read_some(received, call, 5)
        began = time.monotonic()
        while len(received.heartbeats) < 2:
            received.take((await anext(aiter(call))).event)
        assert 1.8 < time.monotonic() - began < 4.0
        assert list(received.heartbeats[0].endpoints) == [f"127.0.0.1:{house.tokenizer.own_port}", "other:1"]
        assert not received.heartbeats[0].draining
        only(house).log()
        await received.read(call)
        assert len(received.heartbeats) == 2


async def test_a_slow_reader_is_ended_and_can_resume(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """R5: by a write that does not return; its handler ends, and a stream beside it goes on."""
    monkeypatch.setattr(reader, "SLOW_LIMIT", 0.5)
    output = codec.encode(TEXT) * 2000
    async with house_of(codec, in_big_messages(codec, output, 500), channel_options=SMALL_WINDOW) as house:
        await Received().read(house.stream(request_id="warm"))
        before = len(asyncio.all_tasks())
        call, received = house.stream(), Received()
        await read_some(received, call, 1)
        beside = await Received().read(house.stream())
        await until(lambda: len(house.first.detaches) == 3, 10)
        assert len(house.tokenizer.readers) == 0
        with pytest.raises(aio.AioRpcError) as failure:
            await received.read(call)
        assert isinstance(rpc.from_call_error(failure.value), SlowReader)
        await until(lambda: len(asyncio.all_tasks()) <= before)
        count = len(received.ids[0])
        assert 0 < count < len(output)
        name = public.GenerationName(generation_id=received.started[0].generation_id)
        cursor = common_pb2.Cursor(count=count, running_hash=hash_ids(output[:count]))
        resumed = Received({0: count})
        await resumed.read(house.generation.Resume(public.ResumeRequest(generation=name, cursors=[cursor])))
    assert received.ids[0] + resumed.ids[0] == beside.ids[0] == output


async def test_a_reader_that_leaves_is_detached(codec: Codec) -> None:
    async with house_of(codec, slowly(codec, codec.encode(TEXT), 5)) as house:
        received, call = Received(), house.stream()
        await read_some(received, call, 5)
        call.cancel()
        await until(lambda: house.first.detaches == [1])
        assert len(house.tokenizer.readers) == 0
        unary = house.generation.Generate(
            public.GenerateRequest(generation=public.GenerationRequest(prompt="x")), timeout=0.2
        )
        with pytest.raises(aio.AioRpcError, match="DEADLINE_EXCEEDED"):
            await unary
        await until(lambda: house.first.detaches == [1, 2])


@pytest.mark.parametrize("count", [5, 36])
async def test_messages_are_acknowledged(codec: Codec, count: int) -> None:
    """R5: a few of them soon, many at once; without anything else to say."""
    async with house_of(codec, slowly(codec, codec.encode(TEXT), count)) as house:
        received, call = Received(), house.stream()
        await read_some(received, call, count)
        await until(lambda: house.first.acknowledged > count)
        assert house.first.detaches == []
        call.cancel()


async def test_one_stream_serves_many_readers(codec: Codec) -> None:
    output = codec.encode(TEXT)
    async with house_of(codec, [output]) as house:
        received = await asyncio.gather(*(Received().read(house.stream()) for _ in range(24)))
        assert len(house.first.streams) == 1
    assert [one.text[0] for one in received] == [TEXT] * 24


async def test_a_call_passes_its_trace_on(codec: Codec) -> None:
    trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    async with house_of(codec, [codec.encode("x")]) as house:
        request = public.StreamGenerateRequest(generation=public.GenerationRequest(prompt="x"))
        for header in (f"00-{trace}-{span}-01", "nonsense"):
            await Received().read(house.generation.StreamGenerate(request, metadata=(("traceparent", header),)))
    (given, told), (own, _) = house.first.opens
    context, other = unpack(given.spec.trace_context), unpack(own.spec.trace_context)
    assert context is not None
    assert other is not None
    assert (context.trace_id.hex(), context.sampled) == (trace, True)
    assert other.trace_id != context.trace_id
    assert told["traceparent"].startswith(f"00-{trace}-")
    assert len({span, told["traceparent"][36:52], context.span_id.hex()}) == 3, "spans of their own"


async def test_draining(codec: Codec) -> None:
    """R19: streams are told at once, new calls are refused, and at the end those that stayed are ended."""
    async with house_of(codec, slowly(codec, codec.encode(TEXT), 5)) as house:
        received, call = Received(), house.stream()
        await read_some(received, call, 5)
        await house.tokenizer.drain()
        received.take((await anext(aiter(call))).event)
        assert received.heartbeats[0].draining
        assert isinstance(await error_of(house.stream()), Draining)
        house.tokenizer.readers.end_all(Draining("gone"))
        assert isinstance(await error_of(call), Draining)
