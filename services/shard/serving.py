"""The wiring of one shard, in whatever process hosts it, and nothing else."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping

from services.common import process, rpc
from services.common.model_folder import find_model
from services.config import ShardConfig
from services.shard.blocks import BlockPool
from services.shard.engine import Engine
from services.shard.runner import Runner
from services.shard.scheduler import Scheduler
from services.shard.service import Description, ShardService
from services.shard.v1 import shard_pb2_grpc


def build(config: ShardConfig) -> ShardService:
    """Loads the model and puts the shard together.

    Raises:
        ValueError: the model cannot be served with these settings.
    """
    runner = Runner(
        find_model(config.model), block_size=config.block_size, kv_memory=config.kv_memory, threads=config.threads
    )
    # A sequence never needs more than all blocks, so that the first in line can always run.
    context_length = min(runner.context_length, runner.block_count * config.block_size)
    scheduler = Scheduler(
        BlockPool(runner.block_count, config.block_size, prefix_cache=config.prefix_cache),
        step_tokens=config.step_tokens,
        step_sequences=config.step_sequences,
        context_length=context_length,
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
    return ShardService(Engine(scheduler, runner), description)


async def serve(config: ShardConfig, host: process.Host) -> None:
    """Serves until the host says stop; the engine ends with the server.

    Raises:
        OSError: the port is taken, or a file of the model cannot be read.
        ValueError: the model cannot be served with these settings.
    """
    service = await asyncio.to_thread(build, config)
    gc.freeze()  # what the model is made of stays for ever; no collection needs to walk over it
    server = rpc.inside_server()
    shard_pb2_grpc.add_ShardServiceServicer_to_server(service, server)
    port = rpc.bind(server, config.host, config.port)

    def load() -> Mapping[str, float]:
        return service.load._asdict()

    service.start()
    try:
        await process.run(server, process.Serving((port,), load), host, on_stop=service.drain)
    finally:
        await service.stop()
