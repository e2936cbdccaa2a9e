"""The tokenizer as a process: ready line, shared and own port, draining, exit status."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from grpc import aio

from fermata.v1 import generation_pb2 as public
from fermata.v1 import text_pb2
from fermata.v1.generation_pb2_grpc import GenerationServiceStub
from fermata.v1.text_pb2_grpc import TokenizerServiceStub
from services.common.directory import StaticDirectory
from services.common.telemetry import Telemetry, TelemetrySettings
from services.common.vocabulary import Vocabulary
from services.config import TokenizerConfig
from services.orchestrator.v1 import orchestrator_pb2 as pb
from services.tokenizer.codec import Codec
from services.tokenizer.figures import Figures
from services.tokenizer.reader import Face
from services.tokenizer.serving import Tokenizer, advertised_host
from tests.unit.tokenizer.fake_orchestrator import FakeGeneration, FakeLog, FakeOrchestrator
from tests.unit.tokenizer.house import Received

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Running:
    """A tokenizer process that serves."""

    process: asyncio.subprocess.Process
    public: int
    own: int


@asynccontextmanager
async def tokenizer_process(model: Path, *arguments: str, **environment: str) -> AsyncIterator[Running]:
    reader, writer = os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "services.tokenizer", f"--model={model}", f"--ready-fd={writer}", *arguments),
        cwd=ROOT,
        env={**os.environ, **environment},
        pass_fds=[writer],
        stderr=asyncio.subprocess.PIPE,
    )
    os.close(writer)
    try:
        with os.fdopen(reader) as pipe:
            line = await asyncio.to_thread(pipe.readline)
        shared, own = map(int, line.split())
        yield Running(process, shared, own)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_two_processes_share_a_port_and_have_one_each(model_folders: Mapping[str, Path]) -> None:
    """R18."""
    folder = model_folders["chatml"]
    async with tokenizer_process(folder, "--public-port=0") as one:
        async with tokenizer_process(folder, f"--public-port={one.public}") as other:
            assert one.public == other.public
            assert len({one.public, one.own, other.own}) == 3
            for port in (one.own, other.own, one.public):
                async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                    stub = TokenizerServiceStub(channel)
                    answer = await stub.Tokenize(text_pb2.TokenizeRequest(text="ab"))
                assert b"".join(token.piece for token in answer.tokens) == b"ab"
            other.process.send_signal(signal.SIGTERM)
            assert await other.process.wait() == 0
        assert one.process.returncode is None


async def test_a_stream_moves_when_its_process_drains(
    model_folders: Mapping[str, Path], codecs: Mapping[str, Codec]
) -> None:
    """R19: the stream is told, resumes at another endpoint, and the first process then leaves at once."""
    codec = codecs["chatml"]
    output = codec.encode("Hello world, how are you today?")

    def plan(request: pb.OpenRequest, generation_id: str) -> FakeGeneration:
        generation = FakeGeneration(generation_id, request, [output], codec.vocabulary)
        generation.log(3)
        return generation

    log = FakeLog(plan)
    orchestrator = FakeOrchestrator(log)
    await orchestrator.start()
    common = (f"--orchestrators={orchestrator.address}", "--public-port=0")
    async with (
        tokenizer_process(model_folders["chatml"], *common) as other,
        tokenizer_process(model_folders["chatml"], *common, f"--endpoints=127.0.0.1:{other.own}") as one,
        aio.insecure_channel(f"127.0.0.1:{one.public}") as first_channel,
    ):
        received = Received()
        request = public.StreamGenerateRequest(generation=public.GenerationRequest(prompt="x"))
        call = GenerationServiceStub(first_channel).StreamGenerate(request)
        while not received.ids.get(0):
            received.take((await anext(aiter(call))).event)
        one.process.send_signal(signal.SIGTERM)
        while not received.heartbeats:
            received.take((await anext(aiter(call))).event)
        (beat,) = received.heartbeats
        assert beat.draining
        assert list(beat.endpoints) == [f"127.0.0.1:{one.own}", f"127.0.0.1:{other.own}"]
        call.cancel()
        assert await asyncio.wait_for(one.process.wait(), 5) == 0
        next(iter(log.generations.values())).log()
        async with aio.insecure_channel(beat.endpoints[1]) as channel:
            name = public.GenerationName(generation_id=received.started[0].generation_id)
            resumed = await Received().read(
                GenerationServiceStub(channel).Resume(public.ResumeRequest(generation=name))
            )
    await orchestrator.stop()
    assert resumed.text == {0: "Hello world, how are you today?"}


async def test_failpoints_are_armed_only_when_testing(model_folders: Mapping[str, Path]) -> None:
    folder, armed = model_folders["chatml"], {"FERMATA_FAILPOINTS": "tokenizer.open.before:kill"}
    request = public.GenerateRequest(generation=public.GenerationRequest(prompt="x"))
    for flag, expected in (("--testing", -signal.SIGKILL), ("--no-testing", None)):
        async with (
            tokenizer_process(folder, "--public-port=0", "--orchestrators=127.0.0.1:1", flag, **armed) as running,
            aio.insecure_channel(f"127.0.0.1:{running.public}") as channel,
        ):
            with pytest.raises(aio.AioRpcError):
                await GenerationServiceStub(channel).Generate(request, timeout=1.0)
            if expected is not None:
                await asyncio.wait_for(running.process.wait(), 5)
            assert running.process.returncode == expected


@pytest.mark.parametrize("arguments", [("--model=nowhere",), ("--public-port=1",)])
async def test_what_keeps_it_from_starting(arguments: tuple[str, ...], model_folders: Mapping[str, Path]) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.tokenizer", f"--model={model_folders['chatml']}", "--host=203.0.113.1"),
        *arguments,
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert errors.decode().splitlines()[-1].startswith("tokenizer: ")


def test_the_endpoints_that_clients_are_told() -> None:
    others = StaticDirectory(["a:1", "10.0.0.1:5", "b:1", "c:1", "d:1"])
    telemetry = Telemetry("tokenizer", TelemetrySettings())
    face = Face(Vocabulary([], {}), (), "10.0.0.1:5", others, telemetry, Figures(telemetry.metrics, lambda: 0))
    assert face.endpoints == ["10.0.0.1:5", "a:1", "b:1", "c:1"]
    assert advertised_host(TokenizerConfig(host="10.0.0.1")) == "10.0.0.1"
    assert advertised_host(TokenizerConfig(host="0.0.0.0", advertised_host="public.example")) == "public.example"
    assert advertised_host(TokenizerConfig(host="0.0.0.0")) not in ("0.0.0.0", "")


async def test_a_port_that_is_taken_is_an_error(codecs: Mapping[str, Codec]) -> None:
    orchestrator = FakeOrchestrator(FakeLog(lambda request, name: None))  # type: ignore[arg-type,return-value]
    await orchestrator.start()  # binds its port alone
    port = int(orchestrator.address.rpartition(":")[2])
    for taken in ({"port": port}, {"public_port": port}):
        config = TokenizerConfig(model="", **{"public_port": 0, **taken})  # type: ignore[arg-type]
        with pytest.raises(OSError, match="cannot listen"):
            Tokenizer(config, codecs["chatml"], StaticDirectory([]), StaticDirectory([]))
    await orchestrator.stop()
