"""The processes that a benchmark measures, and the CPU time that the kernel says they used.

Knows how services are started as plain processes; not what is measured.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from grpc import aio

from services.common import rpc
from services.orchestrator.v1 import orchestrator_pb2
from services.orchestrator.v1.orchestrator_pb2_grpc import OrchestratorServiceStub
from services.shard.v1 import shard_pb2
from services.shard.v1.shard_pb2_grpc import ShardServiceStub
from tests.valkey import Valkey, start_valkey

START_TIMEOUT = 60.0


def cpu_seconds(pids: dict[str, int]) -> dict[str, float]:
    """CPU seconds of each process so far, over all of its threads, in the kernel's nanosecond counters."""
    seconds = {}
    for name, pid in pids.items():
        threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
        seconds[name] = sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9
    return seconds


def _compute_seconds(pid: int) -> float:
    """CPU seconds of the threads that the native kernels started besides the engine's own."""
    tasks = [task for task in Path(f"/proc/{pid}/task").iterdir() if (task / "comm").read_text().strip() == "compute"]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


class System:
    """A store, a shard, an orchestrator and a tokenizer, each a process of its own.

    Attributes:
        model: folder of the model.
        threads: compute threads of the shard.
        pids: by name; `client` is this process.
        shard, orchestrator, tokenizer: addresses.
        bare: address of a server that only sends messages, for comparison.
        vocabulary_size: of the model.
    """

    def __init__(self, folder: Path, model: str, threads: int) -> None:
        self.model, self.threads = model, threads
        self.pids: dict[str, int] = {"client": os.getpid()}
        self.shard = self.orchestrator = self.tokenizer = self.bare = ""
        self.vocabulary_size = 0
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._valkey: Valkey | None = None
        self._loads: asyncio.Queue[shard_pb2.Load] = asyncio.Queue()
        self._channels: list[aio.Channel] = []
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._start_all()
        except BaseException:
            await self._stop_all()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop_all()

    async def _start_all(self) -> None:
        (self._folder / "store").mkdir()
        self._valkey = await asyncio.to_thread(start_valkey, self._folder / "store")
        self.pids["store"] = self._valkey.process.pid
        self.bare = await self._start("bare", module="tests.bench.bare")
        self.shard = await self._start("shard", "--model", self.model, "--port", "0", "--threads", str(self.threads))
        self.orchestrator = await self._start(
            "orchestrator", "--model", self.model, "--shards", self.shard, "--redis-url", self._valkey.url
        )
        self.tokenizer = await self._start(
            "tokenizer", "--model", self.model, "--orchestrators", self.orchestrator, "--public-port", "0"
        )
        self._channels = [rpc.inside_channel(address) for address in (self.shard, self.orchestrator)]
        description = await ShardServiceStub(self._channels[0]).Describe(shard_pb2.DescribeRequest())
        self.vocabulary_size = description.vocabulary_size
        self._watch = asyncio.create_task(self._watch_load(self._channels[0]))

    async def _stop_all(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        for channel in self._channels:
            await channel.close()
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            await asyncio.to_thread(process.wait, 15)
        if self._valkey is not None:
            self._valkey.stop()

    async def engine_seconds(self) -> float:
        """CPU seconds of the engine's threads, from a heartbeat that comes after this call."""
        while not self._loads.empty():
            self._loads.get_nowait()
        await self._loads.get()  # may have been on its way
        return (await self._loads.get()).engine_cpu_ns / 1e9 + _compute_seconds(self.pids["shard"])

    async def orchestrator_facts(self) -> orchestrator_pb2.IdentifyResponse:
        """The orchestrator's counters."""
        return await OrchestratorServiceStub(self._channels[1]).Identify(orchestrator_pb2.IdentifyRequest())

    async def _watch_load(self, channel: aio.Channel) -> None:
        """Reads the heartbeats of a link on which nothing is admitted."""
        call = ShardServiceStub(channel).Link()
        while isinstance(response := await call.read(), shard_pb2.LinkResponse):
            self._loads.put_nowait(response.load)

    async def _start(self, service: str, *arguments: str, module: str = "") -> str:
        """Starts a service and returns its address as soon as it serves."""
        read_end, write_end = os.pipe()
        command = [sys.executable, "-m", module or f"services.{service}", *arguments, "--ready-fd", str(write_end)]
        log = (self._folder / f"{service}.log").open("wb")
        process = await asyncio.to_thread(
            subprocess.Popen, command, pass_fds=[write_end], stderr=log, stdin=subprocess.DEVNULL
        )
        self._processes.append(process)
        self.pids[service] = process.pid
        os.close(write_end)
        with os.fdopen(read_end) as pipe:
            line = await asyncio.wait_for(asyncio.to_thread(pipe.readline), START_TIMEOUT)
        if not line:
            raise RuntimeError(f"{service} did not start:\n{(self._folder / f'{service}.log').read_text()}")
        return f"127.0.0.1:{line.split()[0]}"
