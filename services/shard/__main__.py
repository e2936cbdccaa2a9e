"""`python -m services.shard --model FOLDER --port 0 --ready-fd N`: a shard as a plain process.

The wiring of one shard, and nothing else.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys

from services.common import failpoints, process, rpc
from services.common.model_folder import find_model
from services.config import ShardConfig, load, process_environment
from services.shard.blocks import BlockPool
from services.shard.engine import Engine
from services.shard.runner import Runner
from services.shard.scheduler import Scheduler
from services.shard.service import Description, ShardService
from services.shard.v1 import shard_pb2_grpc

log = logging.getLogger("services.shard")


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


async def serve(service: ShardService, config: ShardConfig) -> None:
    """Serves until a signal; the engine ends with the server."""
    server = rpc.inside_server()
    shard_pb2_grpc.add_ShardServiceServicer_to_server(service, server)
    port = rpc.bind(server, config.host, config.port)
    service.start()
    try:
        await process.run(server, port, config.ready_fd, on_stop=service.drain)
    finally:
        await service.stop()


def main() -> int:
    """Reads the settings and serves. Returns the exit status."""
    config, _ = load(ShardConfig)
    process.configure_logging("shard")
    try:
        failpoints.configure(process_environment(), testing=config.testing)
        service = build(config)
        gc.freeze()  # what the model is made of stays for ever; no collection needs to walk over it
        asyncio.run(serve(service, config))
    except (OSError, ValueError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
