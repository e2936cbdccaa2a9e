"""The same generations at each level of the house; each returns the seconds from the first request to the last token.

Knows how each level is spoken to; not what its processes cost.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from fermata.aio import AsyncClient
from fermata.v1 import generation_pb2
from fermata.v1.generation_pb2_grpc import GenerationServiceStub
from services.common import rpc
from services.common.types import pack_ids
from services.orchestrator.v1 import orchestrator_pb2
from services.orchestrator.v1.orchestrator_pb2_grpc import OrchestratorServiceStub
from services.shard.v1 import shard_pb2
from services.shard.v1.shard_pb2_grpc import ShardServiceStub
from tests.bench.processes import System
from tests.bench.workload import Workload


async def engine_alone(system: System, workload: Workload) -> float:
    """The loop of the shard in a process of its own, without any gRPC."""
    figures = {
        "streams": workload.streams,
        "tokens": workload.tokens,
        "prompt": workload.prompt_tokens,
        "seed": workload.seed,
        "threads": system.threads,
    }
    flags = [f"--{name}={value}" for name, value in figures.items()]
    command = [sys.executable, "-m", "tests.bench.engine", "--model", system.model, *flags]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    return float(output)


async def bare_streams(system: System, workload: Workload) -> float:
    """One message per token and stream from a server that does nothing else, at about the pace of the engine."""
    pace = 0.003 if workload.streams == 1 else 0.004 if workload.streams <= 8 else 0.009
    async with rpc.inside_channel(system.bare) as channel:
        stub = GenerationServiceStub(channel)
        began = time.perf_counter()

        async def read() -> None:
            request = generation_pb2.StreamGenerateRequest()
            request.generation.request_id = str(pace)
            request.generation.stop.max_tokens = workload.tokens
            async for _ in stub.StreamGenerate(request):
                pass

        await asyncio.gather(*(read() for _ in range(workload.streams)))
        return time.perf_counter() - began


async def shard_link(system: System, workload: Workload) -> float:
    """A link of our own to the shard: one message per step."""
    async with rpc.inside_channel(system.shard) as channel:
        call = ShardServiceStub(channel).Link()
        admits = [
            shard_pb2.Admit(
                attempt=number,
                generation_id=f"bench-{workload.seed}-{number}",
                tenant=f"bench-{workload.seed}-link",
                token_ids=pack_ids(prompt),
                output_start=len(prompt),
                sampling=shard_pb2.SamplingProgram(top_p=1.0, repetition_penalty=1.0),
                max_count=workload.tokens,
                grant=workload.tokens,
            )
            for number, prompt in enumerate(workload.prompts(), 1)
        ]
        began, received = time.perf_counter(), 0
        await call.write(shard_pb2.LinkRequest(admits=admits))
        while received < workload.total:
            response = await call.read()
            assert isinstance(response, shard_pb2.LinkResponse)
            received += sum(len(step.token_ids) for step in response.steps)
        return time.perf_counter() - began


async def through_orchestrator(system: System, workload: Workload) -> float:
    """Opened at the orchestrator, read on one stream: one message per wake-up for all generations."""
    async with rpc.inside_channel(system.orchestrator) as channel:
        stub = OrchestratorServiceStub(channel)
        requests: asyncio.Queue[orchestrator_pb2.ReadRequest] = asyncio.Queue()
        call = stub.Read(_taken_from(requests))
        began, received = time.perf_counter(), 0

        async def open_one(number: int, prompt: list[int]) -> None:
            request = orchestrator_pb2.OpenRequest(tenant="default", prompt_token_ids=pack_ids(prompt))
            request.spec.n = 1
            request.spec.stop.max_tokens = workload.tokens
            request.spec.sampling.temperature = 0.0
            opened = await stub.Open(request)
            name = orchestrator_pb2.Name(tenant="default", generation_id=opened.generation_id)
            attach = orchestrator_pb2.Attach(reader=number, name=name)
            requests.put_nowait(orchestrator_pb2.ReadRequest(attaches=[attach]))

        async with asyncio.TaskGroup() as group:
            for number, prompt in enumerate(workload.prompts(), 1):
                group.create_task(open_one(number, prompt))
            async for response in call:
                received += len(response.tokens.token_ids)
                if response.sequence % 16 == 0:
                    requests.put_nowait(orchestrator_pb2.ReadRequest(acknowledged=response.sequence))
                if received == workload.total:
                    break
        call.cancel()
        return time.perf_counter() - began


async def _taken_from(
    queue: asyncio.Queue[orchestrator_pb2.ReadRequest],
) -> AsyncIterator[orchestrator_pb2.ReadRequest]:
    while True:
        yield await queue.get()


async def through_tokenizer(system: System, workload: Workload) -> float:
    """The public API by its raw stubs: one stream per generation."""
    async with rpc.inside_channel(system.tokenizer) as channel:
        stub = GenerationServiceStub(channel)
        began = time.perf_counter()

        async def read(prompt: list[int]) -> int:
            request = generation_pb2.StreamGenerateRequest()
            request.generation.token_ids.ids.extend(prompt)
            request.generation.sampling.temperature = 0.0
            request.generation.stop.max_tokens = workload.tokens
            request.generation.stop.ignore_eos = True
            received = 0
            async for response in stub.StreamGenerate(request):
                received += len(response.event.tokens.token_ids)
            return received

        counts = await asyncio.gather(*(read(prompt) for prompt in workload.prompts()))
        assert sum(counts) == workload.total
        return time.perf_counter() - began


async def with_client_library(system: System, workload: Workload) -> float:
    """As a user does: typed events, text, hashes checked."""
    async with AsyncClient(system.tokenizer) as client:
        began = time.perf_counter()

        async def read(prompt: list[int]) -> int:
            options = {"token_ids": prompt, "temperature": 0.0, "max_tokens": workload.tokens, "ignore_eos": True}
            async with client.stream(**options) as stream:  # type: ignore[arg-type]
                async for _ in stream:
                    pass
            return len(stream.token_ids)

        counts = await asyncio.gather(*(read(prompt) for prompt in workload.prompts()))
        assert sum(counts) == workload.total
        return time.perf_counter() - began


LEVELS: dict[str, Callable[[System, Workload], Awaitable[float]]] = {
    "engine alone": engine_alone,
    "(one bare gRPC hop)": bare_streams,
    "+ shard's link": shard_link,
    "+ orchestrator": through_orchestrator,
    "+ tokenizer": through_tokenizer,
    "+ client library": with_client_library,
}
