"""The wiring of one orchestrator, in whatever process hosts it.

Knows how the parts are put together; `service.py` serves.
"""

from __future__ import annotations

import asyncio
import secrets

from services.common import process, rpc
from services.common.directory import Directory
from services.common.model_folder import find_model
from services.common.vocabulary import Vocabulary
from services.config import OrchestratorConfig
from services.orchestrator.generation import Generation
from services.orchestrator.owner import Owner
from services.orchestrator.recovery import Recovery
from services.orchestrator.service import OrchestratorService
from services.orchestrator.sessions import SessionStore
from services.orchestrator.v1.orchestrator_pb2_grpc import add_OrchestratorServiceServicer_to_server

DEFAULT_CONTEXT = 1 << 20
"""Bound of a sequence while no shard has told its own; shards hold their own limit in any case."""


def build(config: OrchestratorConfig, port: int, shards: Directory) -> OrchestratorService:
    """Puts an orchestrator together that others will find at `port`."""
    process_id = secrets.token_hex(16)
    address = f"{config.host}:{port}"
    store = SessionStore(config.redis_url, process_id=process_id, address=address, ttl=config.session_ttl)
    vocabulary = Vocabulary.from_file(find_model(config.model) / "tokenizer.json")

    def rewrite(generation: Generation) -> None:
        recovery.rewrite(generation)

    owner = Owner(store, shards, window=config.window, park_after=config.park_after, rewrite=rewrite)
    recovery = Recovery(store, owner, table=vocabulary.table, process_id=process_id, default_context=DEFAULT_CONTEXT)
    return OrchestratorService(store, owner, recovery, process_id)


async def serve(config: OrchestratorConfig, host: process.Host, shards: Directory) -> None:
    """Serves until the host says stop.

    Raises:
        OSError: the port is taken, or a file of the model cannot be read.
        ExceptionGroup: with the error of a part that failed, such as SessionStoreUnavailable at the start.
    """
    server = rpc.inside_server()
    port = rpc.bind(server, config.host, config.port)
    service = build(config, port, shards)
    add_OrchestratorServiceServicer_to_server(service, server)
    async with asyncio.TaskGroup() as group:
        await service.start(group)
        await process.run(server, process.Serving((port,), service.load), host, on_stop=service.drain)
        await service.stop()
