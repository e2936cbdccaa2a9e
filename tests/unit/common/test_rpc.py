"""Errors to statuses and back, over a real server, for all kinds of calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc import aio

from services.common import errors, rpc
from services.common.errors import BY_REASON, FermataError, FieldViolation, InternalError, InvalidRequest
from services.shard.v1 import shard_pb2
from services.shard.v1.shard_pb2_grpc import (
    ShardServiceServicer,
    ShardServiceStub,
    add_ShardServiceServicer_to_server,
)


class Raising(ShardServiceServicer):
    """Raises what it is given, from a unary and from a streaming call."""

    def __init__(self) -> None:
        self.error: Exception = RuntimeError("secret")
        self.closed = asyncio.Event()

    async def Describe(self, request: shard_pb2.DescribeRequest, context: rpc.Context) -> shard_pb2.DescribeResponse:
        raise self.error

    async def Link(
        self, request_iterator: AsyncIterator[shard_pb2.LinkRequest], context: rpc.Context
    ) -> AsyncIterator[shard_pb2.LinkResponse]:
        try:
            yield shard_pb2.LinkResponse()
            async for _ in request_iterator:
                raise self.error
            await asyncio.sleep(60)
        finally:
            self.closed.set()


@pytest.fixture
async def served() -> AsyncIterator[tuple[Raising, aio.Channel]]:
    servicer, server = Raising(), rpc.inside_server()
    add_ShardServiceServicer_to_server(servicer, server)
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    channel = rpc.inside_channel(f"127.0.0.1:{port}")
    yield servicer, channel
    await channel.close()
    await server.stop(None)


@pytest.mark.parametrize("kind", BY_REASON.values(), ids=BY_REASON.keys())
def test_every_error_survives_the_way(kind: type[FermataError]) -> None:
    error = kind(
        "what to do", metadata={"key": "value"}, violations=[FieldViolation("a.b", "must be c")], retry_delay=0.25
    )
    back = rpc.from_status(rpc.to_status(error))
    assert type(back) is BY_REASON[kind.reason]
    assert (back.message, back.metadata, back.violations, back.retry_delay) == (
        error.message,
        error.metadata,
        error.violations,
        error.retry_delay,
    )


def test_every_reason_is_in_the_public_contract() -> None:
    from fermata.v1 import errors_pb2

    names = errors_pb2.ErrorReason.keys()
    public = {name.removeprefix("ERROR_REASON_") for name in names} - {"UNSPECIFIED"}
    assert public == set(BY_REASON)
    for reason, kind in BY_REASON.items():
        assert reason in (errors.__doc__ or ""), f"{kind.__name__} is missing in the drawn tree"


async def test_unary_and_streaming_calls_carry_the_rich_status(served: tuple[Raising, aio.Channel]) -> None:
    servicer, channel = served
    servicer.error = InvalidRequest("no", violations=[FieldViolation("x", "must be y")])
    stub = ShardServiceStub(channel)
    with pytest.raises(aio.AioRpcError) as unary:
        await stub.Describe(shard_pb2.DescribeRequest())
    call = stub.Link()
    await call.read()
    await call.write(shard_pb2.LinkRequest())
    with pytest.raises(aio.AioRpcError) as stream:
        await call.read()
    for caught in (unary.value, stream.value):
        assert caught.code() is grpc.StatusCode.INVALID_ARGUMENT
        error = rpc.from_call_error(caught)
        assert isinstance(error, InvalidRequest)
        assert error.violations == [FieldViolation("x", "must be y")]


async def test_unexpected_errors_say_nothing_but_an_id(
    served: tuple[Raising, aio.Channel], caplog: pytest.LogCaptureFixture
) -> None:
    _, channel = served
    with pytest.raises(aio.AioRpcError) as caught:
        await ShardServiceStub(channel).Describe(shard_pb2.DescribeRequest())
    error = rpc.from_call_error(caught.value)
    assert isinstance(error, InternalError)
    assert "secret" not in str(caught.value)
    assert error.metadata["error_id"] in caplog.text


async def test_a_streaming_handler_is_cleaned_up_when_the_caller_leaves(served: tuple[Raising, aio.Channel]) -> None:
    servicer, channel = served
    call = ShardServiceStub(channel).Link()
    await call.read()
    call.cancel()
    await asyncio.wait_for(servicer.closed.wait(), 5)


async def test_a_call_that_never_arrived_has_no_error_of_ours() -> None:
    async with rpc.inside_channel("127.0.0.1:1") as channel:
        with pytest.raises(aio.AioRpcError) as caught:
            await ShardServiceStub(channel).Describe(shard_pb2.DescribeRequest())
    assert rpc.from_call_error(caught.value) is None


async def test_a_taken_port_is_an_os_error(served: tuple[Raising, aio.Channel]) -> None:
    server = rpc.inside_server()
    port = rpc.bind(server, "127.0.0.1", 0)
    with pytest.raises(OSError, match="cannot listen"):
        rpc.bind(rpc.inside_server(), "127.0.0.1", port)
