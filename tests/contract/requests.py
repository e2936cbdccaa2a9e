"""Requests of the resume tests, and what they are held against: the whole result of the same request, undisturbed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable

import pytest
from google.rpc import error_details_pb2
from grpc import StatusCode, aio

from fermata.v1 import common_pb2
from fermata.v1 import generation_pb2 as pb
from fermata.v1.generation_pb2_grpc import GenerationServiceStub
from tests.contract.raw_reader import Choice, RawReader
from tests.contract.statuses import error_info
from tests.pipeline.house import House


def new_request(
    *, n: int = 1, max_tokens: int = 64, temperature: float = 1.0, session_id: str = "", seed: int = 11
) -> pb.GenerationRequest:
    """A seeded request that runs to `max_tokens`; without a request_id."""
    request = pb.GenerationRequest(n=n, session_id=session_id)
    request.token_ids.ids.extend([20, 30, 40, 50])
    request.sampling.temperature = temperature
    request.sampling.seed = seed
    request.stop.max_tokens = max_tokens
    request.stop.ignore_eos = True
    return request


def own_ids(request: pb.GenerationRequest) -> pb.GenerationRequest:
    """The same with a fresh request_id."""
    copy = pb.GenerationRequest()
    copy.CopyFrom(request)
    copy.request_id = secrets.token_hex(16)
    return copy


async def generate(house: House, request: pb.GenerationRequest) -> pb.GenerateResponse:
    """The whole result."""
    async with aio.insecure_channel(house.address) as channel:
        return await GenerationServiceStub(channel).Generate(pb.GenerateRequest(generation=request))


_results: dict[bytes, pb.GenerateResponse] = {}


async def undisturbed(house: House, request: pb.GenerationRequest) -> pb.GenerateResponse:
    """What the request gives when nothing happens. Asked once: its seed makes it the same in every house (P3)."""
    key = request.SerializeToString(deterministic=True)
    if key not in _results:
        _results[key] = await generate(house, request)
    return _results[key]


async def with_stop_string(house: House, request: pb.GenerationRequest) -> pb.GenerationRequest:
    """Adds a stop string that choice 0 meets late: three characters of its own text."""
    text = (await undisturbed(house, request)).choices[0].text
    place = next(i for i in range(len(text) // 2, len(text) - 2) if text.find(text[i : i + 3]) == i)
    copy = pb.GenerationRequest()
    copy.CopyFrom(request)
    copy.stop.strings.append(text[place : place + 3])
    return copy


async def parked_log(house: House, name: pb.GenerationName | None) -> list[int]:
    """Waits until nobody runs the generation; what the log has of choice 0 then."""
    async with aio.insecure_channel(house.address) as channel:
        stub = GenerationServiceStub(channel)
        for _ in range(1000):
            stored = await stub.GetGeneration(pb.GetGenerationRequest(generation=name))
            if stored.state == pb.GENERATION_STATE_PARKED:
                return list(stored.choices[0].token_ids)
            assert stored.state == pb.GENERATION_STATE_RUNNING
            await asyncio.sleep(0.02)
    raise TimeoutError("the generation was never parked")


async def eventually(condition: Callable[[], bool]) -> None:
    """Waits until something holds."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise TimeoutError("it never came to hold")


def total(reader: RawReader) -> int:
    """Tokens of all choices."""
    return sum(choice.count for choice in reader.choices.values())


def has(count: int, reader: RawReader) -> bool:
    """Whether it has so many tokens."""
    return total(reader) >= count


def honest(choice: int, token_ids: Iterable[int]) -> common_pb2.Cursor:
    """A cursor behind these ids."""
    read = Choice()
    read.append(token_ids)
    return common_pb2.Cursor(choice=choice, count=read.count, running_hash=read.running_hash)


async def refusal(house: House, request: pb.ResumeRequest) -> tuple[StatusCode, error_details_pb2.ErrorInfo]:
    """What a Resume is refused with."""
    async with aio.insecure_channel(house.address) as channel:
        with pytest.raises(aio.AioRpcError) as caught:
            await GenerationServiceStub(channel).Resume(request).read()
    return caught.value.code(), error_info(caught.value)


def same(reader: RawReader, expected: pb.GenerateResponse) -> None:
    """The reader has what the undisturbed run gave: ids, text, end."""
    assert reader.complete
    assert sorted(reader.choices) == [choice.choice for choice in expected.choices]
    for choice in expected.choices:
        read, end = reader.choices[choice.choice], pb.Finished()
        assert read.token_ids == choice.token_ids
        assert read.text == choice.text
        assert read.finished is not None
        assert read.running_hash == choice.finished.running_hash
        end.CopyFrom(read.finished)
        assert (end.finish_reason, end.count, end.WhichOneof("matched"), end.stop_string) == (
            choice.finished.finish_reason,
            choice.finished.count,
            choice.finished.WhichOneof("matched"),
            choice.finished.stop_string,
        )
