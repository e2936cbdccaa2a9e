"""`python -m services.orchestrator`: one orchestrator process.

Knows how the parts are put together; `service.py` serves.
"""

from __future__ import annotations

import asyncio
import secrets
import sys

from services.common import failpoints, process, rpc
from services.common.errors import SessionStoreUnavailable
from services.common.model_folder import find_model
from services.common.vocabulary import Vocabulary
from services.config import OrchestratorConfig, load, process_environment
from services.orchestrator.generation import Generation
from services.orchestrator.owner import Owner
from services.orchestrator.recovery import Recovery
from services.orchestrator.service import OrchestratorService
from services.orchestrator.sessions import SessionStore
from services.orchestrator.v1.orchestrator_pb2_grpc import add_OrchestratorServiceServicer_to_server

DEFAULT_CONTEXT = 1 << 20
"""Bound of a sequence while no shard has told its own; shards hold their own limit in any case."""


def build(config: OrchestratorConfig, port: int) -> OrchestratorService:
    """Puts an orchestrator together that others will find at `port`."""
    process_id = secrets.token_hex(16)
    address = f"{config.host}:{port}"
    store = SessionStore(config.redis_url, process_id=process_id, address=address, ttl=config.session_ttl)
    vocabulary = Vocabulary.from_file(find_model(config.model) / "tokenizer.json")

    def rewrite(generation: Generation) -> None:
        recovery.rewrite(generation)

    owner = Owner(store, config.shards, window=config.window, park_after=config.park_after, rewrite=rewrite)
    recovery = Recovery(store, owner, table=vocabulary.table, process_id=process_id, default_context=DEFAULT_CONTEXT)
    return OrchestratorService(store, owner, recovery, process_id)


async def serve(config: OrchestratorConfig) -> None:
    """Serves until a signal.

    Raises:
        OSError: the port is taken.
        SessionStoreUnavailable: the session store does not answer at the start.
    """
    server = rpc.inside_server()
    port = rpc.bind(server, config.host, config.port)
    service = build(config, port)
    add_OrchestratorServiceServicer_to_server(service, server)
    async with asyncio.TaskGroup() as group:
        await service.start(group)
        await process.run(server, port, config.ready_fd, on_stop=service.drain)
        await service.stop()


def main() -> int:
    """Runs the process; returns its exit status."""
    config, _ = load(OrchestratorConfig)
    failpoints.configure(process_environment(), testing=config.testing)
    process.configure_logging("orchestrator")
    status = 0
    try:
        asyncio.run(serve(config))
    except* (OSError, ValueError, SessionStoreUnavailable) as group:
        print(f"orchestrator: {group.exceptions[0]}", file=sys.stderr)
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
