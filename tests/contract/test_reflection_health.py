"""What tools find without our code: health, and reflection that is enough to generate with (as grpcurl does)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fermata.v1 import generation_pb2, model_pb2, session_pb2, telemetry_pb2, text_pb2
from fermata.v1.generation_pb2_grpc import GenerationServiceStub
from tests.contract.statuses import error_info
from tests.pipeline.house import House

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]

PUBLIC_FILES = tuple(module.DESCRIPTOR for module in (generation_pb2, session_pb2, text_pb2, model_pb2, telemetry_pb2))
PUBLIC_SERVICES = {service.full_name for file in PUBLIC_FILES for service in file.services_by_name.values()}
STANDARD_SERVICES = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Reflected:
    """A server as reflection shows it: descriptors in a pool that knows nothing of this process's generated code."""

    def __init__(self, channel: aio.Channel) -> None:
        self._channel = channel
        self._stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        self._pool = descriptor_pool.DescriptorPool()
        self._known: set[str] = set()

    async def ask(self, **question: Any) -> Any:
        """One question, one answer."""
        requests = [reflection_pb2.ServerReflectionRequest(**question)]
        return await self._stub.ServerReflectionInfo(iter(requests)).read()

    async def services(self) -> set[str]:
        """Names of all services."""
        answer = await self.ask(list_services="")
        return {service.name for service in answer.list_services_response.service}

    async def files_of(self, **question: Any) -> list[descriptor_pb2.FileDescriptorProto]:
        """The files that an answer holds."""
        answer = await self.ask(**question)
        files = answer.file_descriptor_response.file_descriptor_proto
        return [descriptor_pb2.FileDescriptorProto.FromString(file) for file in files]

    async def learn(self, service: str) -> None:
        """Adds the file of a service to the pool, after everything that it imports."""
        await self._learn(await self.files_of(file_containing_symbol=service))

    async def _learn(self, files: Iterable[descriptor_pb2.FileDescriptorProto]) -> None:
        files = list(files)
        together = {file.name for file in files}
        for file in files:
            for name in file.dependency:
                if name not in self._known | together:
                    await self._learn(await self.files_of(file_by_filename=name))
        waiting = [file for file in files if file.name not in self._known]
        while waiting:
            file = next(file for file in waiting if set(file.dependency) <= self._known)
            waiting.remove(file)
            self._pool.Add(file)  # type: ignore[attr-defined]
            self._known.add(file.name)

    def message(self, name: str) -> Any:
        """A new message, by its full name."""
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(name))()

    def stream(self, service: str, method: str, request: Any) -> aio.UnaryStreamCall[Any, Any]:
        """Calls a method that streams its answers."""
        described = self._pool.FindServiceByName(service).methods_by_name[method]
        assert described.server_streaming
        assert not described.client_streaming
        response = message_factory.GetMessageClass(described.output_type)
        call: aio.UnaryStreamMultiCallable[Any, Any] = self._channel.unary_stream(
            f"/{service}/{method}",
            request_serializer=lambda message: bytes(message.SerializeToString()),
            response_deserializer=response.FromString,
        )
        return call(request)


async def test_reflection_lists_the_services(house: House) -> None:
    async with aio.insecure_channel(house.address) as channel:
        assert await Reflected(channel).services() == PUBLIC_SERVICES | STANDARD_SERVICES


async def test_reflected_files_are_the_contract(house: House) -> None:
    async with aio.insecure_channel(house.address) as channel:
        reflected = Reflected(channel)
        for file in PUBLIC_FILES:
            expected = descriptor_pb2.FileDescriptorProto.FromString(file.serialized_pb)
            assert expected in await reflected.files_of(file_by_filename=file.name)
        answer = await reflected.ask(file_containing_symbol="fermata.v1.NoSuchService")
        assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


async def test_a_stream_without_generated_code(house: House) -> None:
    async with aio.insecure_channel(house.address) as channel:
        reflected = Reflected(channel)
        service = next(name for name in await reflected.services() if name.endswith(".GenerationService"))
        await reflected.learn(service)
        request = reflected.message("fermata.v1.StreamGenerateRequest")
        assert not isinstance(request, generation_pb2.StreamGenerateRequest)
        request.generation.prompt = "hello"
        request.generation.stop.max_tokens = 12
        request.generation.stop.ignore_eos = True
        kinds: list[str] = []
        token_ids: list[int] = []
        text = ""
        async for response in reflected.stream(service, "StreamGenerate", request):
            kind = response.event.WhichOneof("event")
            kinds.append(kind)
            if kind == "tokens":
                token_ids += response.event.tokens.token_ids
                text += response.event.tokens.text
            elif kind == "finished":
                text += response.event.finished.text
        assert (kinds[0], kinds[-1], kinds.count("started"), kinds.count("finished")) == ("started", "finished", 1, 1)
        assert len(token_ids) == 12
        stated = await _detokenized(channel, token_ids)
        assert text == stated


async def _detokenized(channel: aio.Channel, token_ids: list[int]) -> str:
    reflected = Reflected(channel)
    await reflected.learn("fermata.v1.TokenizerService")
    request = reflected.message("fermata.v1.DetokenizeRequest")
    request.token_ids.ids.extend(token_ids)
    call: aio.UnaryUnaryMultiCallable[Any, Any] = channel.unary_unary(
        "/fermata.v1.TokenizerService/Detokenize",
        request_serializer=lambda message: bytes(message.SerializeToString()),
        response_deserializer=type(reflected.message("fermata.v1.DetokenizeResponse")).FromString,
    )
    return str((await call(request)).text)


async def test_health_of_the_whole_and_of_each_service(house: House) -> None:
    async with aio.insecure_channel(house.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", *sorted(PUBLIC_SERVICES)):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == SERVING, service
        with pytest.raises(aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="fermata.v1.NoSuchService"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="fermata.v1.NoSuchService"))
        assert (await unknown.read()).status == SERVICE_UNKNOWN
        unknown.cancel()


async def test_health_is_watched_until_a_tokenizer_leaves(house: House) -> None:
    """R19: a tokenizer that drains says so, and takes nothing new; the other one is not concerned."""
    leaving = house.tokenizers[1]
    assert leaving is not None
    names = ("", "fermata.v1.GenerationService")
    request = generation_pb2.GenerateRequest(generation=generation_pb2.GenerationRequest(prompt="hello"))
    try:
        async with aio.insecure_channel(f"127.0.0.1:{leaving.own_port}") as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            watches = [health.Watch(health_pb2.HealthCheckRequest(service=name)) for name in names]
            assert [(await watch.read()).status for watch in watches] == [SERVING, SERVING]
            await leaving.drain()
            told = [(await asyncio.wait_for(watch.read(), 5)).status for watch in watches]
            assert told == [NOT_SERVING, NOT_SERVING]
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
            with pytest.raises(aio.AioRpcError) as caught:
                await GenerationServiceStub(channel).Generate(request)
            assert (caught.value.code(), error_info(caught.value).reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            for watch in watches:
                watch.cancel()
    finally:
        await house.drop_tokenizer(1)  # it is started again for the next test
    async with aio.insecure_channel(house.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
