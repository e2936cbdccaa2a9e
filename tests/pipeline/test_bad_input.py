"""What users can do wrong: each case gets its documented status and reason at once, and harms nobody beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from fermata.v1 import chat_pb2, generation_pb2, session_pb2
from fermata.v1.generation_pb2_grpc import GenerationServiceStub
from fermata.v1.session_pb2_grpc import SessionServiceStub
from services.common import rpc
from tests.pipeline.house import House, undisturbed

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

Request = generation_pb2.GenerationRequest


def prompt(**fields: Any) -> Request:
    return Request(prompt="hello", **fields)


def sampling(**fields: Any) -> Request:
    request = prompt()
    for name, value in fields.items():
        setattr(request.sampling, name, value)
    return request


def stopping(**fields: Any) -> Request:
    request = prompt()
    for name, value in fields.items():
        target = getattr(request.stop, name)
        if isinstance(value, list):
            target.extend(value)
        else:
            setattr(request.stop, name, value)
    return request


def chat(role: Any, text: str = "hi") -> Request:
    message = chat_pb2.Message(role=role, content=[chat_pb2.ContentPart(text=text)])
    return Request(chat=chat_pb2.ChatInput(messages=[message]))


def ids(*token_ids: int) -> Request:
    request = Request()
    request.token_ids.ids.extend(token_ids)
    return request


UNKNOWN_SESSION, UNKNOWN_GENERATION = "a" * 26, "a" * 26 + "." + "0" * 16

# name: (request, status, reason, fields that are named)
CASES: dict[str, tuple[Callable[[], Request], grpc.StatusCode, str, list[str]]] = {
    "nothing": (Request, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", ["generation.input"]),
    "empty prompt": (
        lambda: Request(prompt=""),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ["generation.prompt"],
    ),
    "no ids": (ids, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", ["generation.token_ids.ids"]),
    "no messages": (
        lambda: Request(chat=chat_pb2.ChatInput()),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ["generation.chat.messages"],
    ),
    "over-long prompt": (
        lambda: ids(*[7] * 100_000),
        grpc.StatusCode.INVALID_ARGUMENT,
        "CONTEXT_LENGTH",
        [],
    ),
    "unknown role": (
        lambda: chat(17),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ["generation.chat.messages[0].role"],
    ),
    "no role": (
        lambda: chat(0),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ["generation.chat.messages[0].role"],
    ),
    "NaN temperature": (
        lambda: sampling(temperature=float("nan")),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ["generation.sampling.temperature"],
    ),
    "infinite penalty": (
        lambda: sampling(presence_penalty=float("inf")),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ["generation.sampling.presence_penalty"],
    ),
    "two at once": (
        lambda: sampling(top_p=0.0, min_p=2.0),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ["generation.sampling.min_p", "generation.sampling.top_p"],
    ),
    "n is huge": (lambda: prompt(n=2**31), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", ["generation.n"]),
    "id beyond the vocabulary": (
        lambda: ids(1, 2**32 - 1),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ["generation.token_ids.ids[1]"],
    ),
    "stop id beyond the vocabulary": (
        lambda: stopping(token_ids=[10**6]),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ["generation.stop.token_ids[0]"],
    ),
    "17 stop strings": (
        lambda: stopping(strings=[f"s{number}" for number in range(17)]),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ["generation.stop.strings"],
    ),
    "an empty stop string": (
        lambda: stopping(strings=[""]),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ["generation.stop.strings[0]"],
    ),
    "unknown model": (lambda: prompt(model="gpt-17"), grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", []),
    "unknown session": (lambda: prompt(session_id=UNKNOWN_SESSION), grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND", []),
    "no session id at all": (lambda: prompt(session_id="../x"), grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND", []),
}


def details(error: aio.AioRpcError) -> tuple[error_details_pb2.ErrorInfo, list[str]]:
    """ErrorInfo, and the paths of the refused fields."""
    raw = next(value for key, value in error.trailing_metadata() or () if key == rpc.STATUS_DETAILS_KEY)
    status = status_pb2.Status.FromString(raw)  # type: ignore[arg-type]
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        for kind in (info, bad_request):
            if detail.Is(kind.DESCRIPTOR):
                detail.Unpack(kind)
    return info, sorted(violation.field for violation in bad_request.field_violations)


async def test_every_case_has_its_status_and_streams_beside_keep_their_tokens(house: House) -> None:
    options = {"token_ids": [9, 10, 11], "temperature": 1.0, "seed": 2, "max_tokens": 200, "ignore_eos": True}
    alone = await undisturbed(house.address, options)
    beside = [asyncio.create_task(undisturbed(house.address, options)) for _ in range(3)]
    async with aio.insecure_channel(house.address) as channel:
        stub = GenerationServiceStub(channel)
        for name, (request, code, reason, fields) in CASES.items():
            for call in (
                lambda given: stub.Generate(generation_pb2.GenerateRequest(generation=given)),
                lambda given: stub.StreamGenerate(generation_pb2.StreamGenerateRequest(generation=given)).read(),
            ):
                began = time.perf_counter()
                with pytest.raises(aio.AioRpcError) as caught:
                    await call(request())
                assert time.perf_counter() - began < 1.0, name
                info, violations = details(caught.value)
                assert (caught.value.code(), info.reason, violations) == (code, reason, fields), name
                assert info.domain == "fermata"
    assert [await task for task in beside] == [alone] * 3


async def test_unknown_names(house: House) -> None:
    async with aio.insecure_channel(house.address) as channel:
        stub, sessions = GenerationServiceStub(channel), SessionServiceStub(channel)
        for generation_id in (UNKNOWN_GENERATION, "nonsense", "a.b.c", ""):
            name = generation_pb2.GenerationName(generation_id=generation_id)
            for call in (
                stub.Resume(generation_pb2.ResumeRequest(generation=name)).read(),
                stub.Cancel(generation_pb2.CancelRequest(generation=name)),
                stub.GetGeneration(generation_pb2.GetGenerationRequest(generation=name)),
            ):
                with pytest.raises(aio.AioRpcError) as caught:
                    await call
                reasons = {"GENERATION_NOT_FOUND", "SESSION_NOT_FOUND"} | (
                    {"INVALID_FIELD"} if not generation_id else set()
                )
                assert details(caught.value)[0].reason in reasons
        with pytest.raises(aio.AioRpcError) as caught:
            await sessions.GetSession(session_pb2.GetSessionRequest(session_id=UNKNOWN_SESSION))
        assert (caught.value.code(), details(caught.value)[0].reason) == (
            grpc.StatusCode.NOT_FOUND,
            "SESSION_NOT_FOUND",
        )


async def test_cursors_that_fit_nothing(house: House) -> None:
    async with aio.insecure_channel(house.address) as channel:
        stub = GenerationServiceStub(channel)
        request = generation_pb2.GenerateRequest(generation=ids(5, 6, 7))
        request.generation.stop.max_tokens = 5
        request.generation.stop.ignore_eos = True
        result = await stub.Generate(request)
        name = generation_pb2.GenerationName(generation_id=result.started.generation_id)
        for cursor, code, reason in (
            ({"count": 6}, grpc.StatusCode.OUT_OF_RANGE, "CURSOR_OUT_OF_RANGE"),
            ({"choice": 3, "count": 0}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
            ({"count": 3, "running_hash": b"12345678"}, grpc.StatusCode.DATA_LOSS, "LOG_DIVERGED"),
        ):
            resume = generation_pb2.ResumeRequest(generation=name)
            resume.cursors.add(**cursor)  # type: ignore[arg-type]
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.Resume(resume).read()
            assert (caught.value.code(), details(caught.value)[0].reason) == (code, reason)
