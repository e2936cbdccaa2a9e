"""The wiring of one shard, in whatever process hosts it, and nothing else."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fermata.v1.telemetry_pb2_grpc import add_TelemetryServiceServicer_to_server
from services.common import process, rpc, sampling
from services.common.model_folder import find_model
from services.common.sampling import Row
from services.common.telemetry import Telemetry
from services.common.telemetry_service import TelemetryService
from services.common.types import SamplingProgram
from services.config import ShardConfig, telemetry_settings
from services.shard import weights
from services.shard.blocks import BlockPool
from services.shard.engine import Engine
from services.shard.runner import Runner
from services.shard.scheduler import Scheduler
from services.shard.service import Description, ShardService
from services.shard.v1 import shard_pb2_grpc

_SMALL_MODEL = 64 << 20
"""Bytes of weights."""


class Shard:
    """All that one process consists of, bound to its port but not yet serving.

    Attributes:
        server: serves it.
        port: that it is bound to.
        service: what is served.
    """

    def __init__(self, config: ShardConfig, service: ShardService, telemetry: Telemetry) -> None:
        """Binds the port.

        Raises:
            OSError: it is taken.
        """
        self._telemetry = telemetry
        self.service = service
        self.server = rpc.inside_server()
        self.port = rpc.bind(self.server, config.host, config.port)
        shard_pb2_grpc.add_ShardServiceServicer_to_server(self.service, self.server)
        telemetry_service = TelemetryService(telemetry, f"{config.host}:{self.port}")
        add_TelemetryServiceServicer_to_server(telemetry_service, self.server)

    @classmethod
    async def load(cls, config: ShardConfig) -> Shard:
        """Loads the model in a thread, then binds the port.

        Raises:
            OSError: the port is taken, or a file of the model cannot be read.
            ValueError: the model cannot be served with these settings.
        """
        telemetry = Telemetry("shard", telemetry_settings(config))
        service = await asyncio.to_thread(build, config, telemetry)
        return cls(config, service, telemetry)

    async def close(self) -> None:
        """Ends the engine."""
        await self.service.stop()
        await asyncio.to_thread(self._telemetry.close)


def build(config: ShardConfig, telemetry: Telemetry) -> ShardService:
    """Loads the model and puts the shard together.

    Raises:
        ValueError: the model cannot be served with these settings.
    """
    folder = find_model(config.model)
    runner = Runner(
        folder,
        block_size=config.block_size,
        kv_memory=config.kv_memory,
        threads=config.threads or _threads_for(folder),
        dtype=config.dtype,
        device=config.device,
        kernels=config.kernels,
    )
    _draw_once(runner.vocabulary_size)
    # A sequence never needs more than all blocks, so that the first in line can always run.
    context_length = min(runner.context_length, runner.block_count * config.block_size)
    scheduler = Scheduler(
        BlockPool(runner.block_count, config.block_size, prefix_cache=config.prefix_cache),
        step_tokens=config.step_tokens,
        step_sequences=config.step_sequences,
        context_length=context_length,
        step_time=config.step_time / 1000,
    )
    description = Description(
        fingerprint=runner.fingerprint,
        context_length=context_length,
        vocabulary_size=runner.vocabulary_size,
        block_size=config.block_size,
        block_count=runner.block_count,
        step_tokens=config.step_tokens,
        step_sequences=config.step_sequences,
    )
    return ShardService(Engine(scheduler, runner), description, telemetry, secrets.token_hex(16))


def _threads_for(folder: Path) -> int:
    """One thread for a small model, whose steps are over before a second one is of use; else all cores."""
    if weights.stored_bytes(folder) <= _SMALL_MODEL:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _draw_once(vocabulary_size: int) -> None:
    """The first draw of a process loads what it needs, for tens of milliseconds: not in somebody's first token."""
    row = Row(SamplingProgram(temperature=1.0, top_k=2), token_ids=[0], output_start=1, choice=0)
    sampling.draw(np.zeros((1, vocabulary_size), dtype=np.float32), [row])


async def serve(config: ShardConfig, host: process.Host) -> None:
    """Serves until the host says stop; the engine ends with the server.

    Raises:
        OSError: the port is taken, or a file of the model cannot be read.
        ValueError: the model cannot be served with these settings.
    """
    shard = await Shard.load(config)
    gc.freeze()  # what the model is made of stays for ever; no collection needs to walk over it

    def load() -> Mapping[str, float]:
        return shard.service.load._asdict()

    shard.service.start()
    try:
        await process.run(shard.server, process.Serving((shard.port,), load), host, on_stop=shard.service.drain)
    finally:
        await shard.close()
