"""`python -m services.shard`: the built-in model in a real process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc import aio

from services.common import rpc
from services.common.types import pack_ids
from services.shard.engine import FAILED
from services.shard.v1 import shard_pb2, shard_pb2_grpc

ROOT = Path(__file__).resolve().parents[3]


class Shard:
    """A shard as a process of its own."""

    def __init__(self, *arguments: str, failpoint: str = "") -> None:
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.shard", f"--ready-fd={writing}", "--kv-memory=4000000", *arguments],
            cwd=ROOT,
            pass_fds=[writing],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "FERMATA_FAILPOINTS": failpoint},
        )
        os.close(writing)
        with os.fdopen(reading) as pipe:
            self.port = pipe.read().strip()

    def end(self) -> str:
        _, errors = self.process.communicate(timeout=20)
        return errors


@pytest.fixture
def started() -> Iterator[list[Shard]]:
    started: list[Shard] = []
    yield started
    for shard in started:
        shard.process.kill()
        shard.process.communicate()


def request(**fields: object) -> shard_pb2.LinkRequest:
    program = shard_pb2.SamplingProgram(temperature=0.8, top_p=0.95, repetition_penalty=1.0, seed=7)
    values = {"attempt": 1, "generation_id": "g", "epoch": 1, "token_ids": pack_ids([1, 2, 3]), "output_start": 3}
    admit = shard_pb2.Admit(sampling=program, **{**values, "max_count": 12, "grant": 12, **fields})  # type: ignore[arg-type]
    return shard_pb2.LinkRequest(admits=[admit])


async def generate(port: str, message: shard_pb2.LinkRequest, count: int) -> list[int]:
    async with rpc.inside_channel(f"127.0.0.1:{port}") as channel:
        stub: shard_pb2_grpc.ShardServiceAsyncStub = shard_pb2_grpc.ShardServiceStub(channel)
        link = stub.Link()
        await link.write(message)
        token_ids: list[int] = []
        async with asyncio.timeout(20):
            while len(token_ids) < count:
                response = await link.read()
                assert isinstance(response, shard_pb2.LinkResponse) and not response.ended
                token_ids += [token_id for step in response.steps for token_id in step.token_ids]
        return token_ids


async def test_it_serves_and_stops_with_status_0(started: list[Shard]) -> None:
    started.append(shard := Shard())
    whole = await generate(shard.port, request(), 12)
    resumed = request(attempt=2, epoch=2, token_ids=pack_ids([1, 2, 3, *whole[:5]]))
    assert await generate(shard.port, resumed, 7) == whole[5:], "a generation goes on where it stopped"
    shard.process.send_signal(signal.SIGTERM)
    errors = shard.end()
    assert shard.process.returncode == 0, errors
    assert "Traceback" not in errors


async def test_an_error_in_a_step_ends_the_process(started: list[Shard]) -> None:
    started.append(shard := Shard("--testing", failpoint="shard.step.before_publish:raise@2"))
    with pytest.raises(aio.AioRpcError) as raised:
        await generate(shard.port, request(), 12)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "FailpointError" in shard.end()
    assert shard.process.returncode == FAILED


def test_without_testing_failpoints_are_not_armed(started: list[Shard]) -> None:
    started.append(shard := Shard(failpoint="shard.admit:kill"))
    assert asyncio.run(generate(shard.port, request(), 1))
    shard.process.terminate()
    shard.end()
    assert shard.process.returncode == 0


def test_a_model_that_is_not_there_is_said_on_standard_error() -> None:
    shard = Shard("--model=/nowhere")
    assert shard.port == ""
    errors = shard.end()
    assert shard.process.returncode == 1
    assert "no folder /nowhere" in errors and "Traceback" not in errors
