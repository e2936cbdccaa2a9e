"""The wiring of one orchestrator, in whatever process hosts it.

Knows how the parts are put together; `service.py` serves.
"""

from __future__ import annotations

import asyncio
import gc
import secrets

from fermata.v1.telemetry_pb2_grpc import add_TelemetryServiceServicer_to_server
from services.common import process, rpc
from services.common.directory import Directory
from services.common.model_folder import find_model
from services.common.rpc_tracing import TraceInterceptor
from services.common.telemetry import Telemetry
from services.common.telemetry_service import Others, TelemetryService
from services.common.vocabulary import Vocabulary
from services.config import OrchestratorConfig, telemetry_settings
from services.orchestrator.generation import Generation
from services.orchestrator.observer import Observer
from services.orchestrator.owner import Owner
from services.orchestrator.recovery import Recovery
from services.orchestrator.service import OrchestratorService
from services.orchestrator.sessions import SessionStore
from services.orchestrator.v1.orchestrator_pb2_grpc import add_OrchestratorServiceServicer_to_server

DEFAULT_CONTEXT = 1 << 20
"""Bound of a sequence while no shard has told its own; shards hold their own limit in any case."""


class Orchestrator:
    """All that one process consists of, bound to its port but not yet serving.

    Attributes:
        server: serves it.
        port: that it is bound to.
        service: what is served.
    """

    def __init__(self, config: OrchestratorConfig, shards: Directory) -> None:
        """Binds the port.

        Raises:
            OSError: it is taken, or a file of the model cannot be read.
        """
        self._telemetry = telemetry = Telemetry("orchestrator", telemetry_settings(config))
        self.server = rpc.inside_server([TraceInterceptor(telemetry, begins_traces=False)])
        self.port = rpc.bind(self.server, config.host, config.port)
        address = f"{config.host}:{self.port}"
        self.service = _build(config, telemetry, address, shards)
        add_OrchestratorServiceServicer_to_server(self.service, self.server)
        others = Others(behind=shards.addresses)
        add_TelemetryServiceServicer_to_server(TelemetryService(telemetry, address, others), self.server)

    async def close(self) -> None:
        """Ends all parts."""
        await self.service.stop()
        await asyncio.to_thread(self._telemetry.close)


def _build(config: OrchestratorConfig, telemetry: Telemetry, address: str, shards: Directory) -> OrchestratorService:
    """Puts an orchestrator together that others will find at `address`."""
    process_id = secrets.token_hex(16)
    observer = Observer(telemetry)
    store = SessionStore(config.redis_url, process_id=process_id, address=address, ttl=config.session_ttl)
    vocabulary = Vocabulary.from_file(find_model(config.model) / "tokenizer.json")

    def rewrite(generation: Generation) -> None:
        recovery.rewrite(generation)

    owner = Owner(store, shards, window=config.window, park_after=config.park_after, observer=observer, rewrite=rewrite)
    recovery = Recovery(
        store, owner, observer, table=vocabulary.table, process_id=process_id, default_context=DEFAULT_CONTEXT
    )
    observer.count(store, owner)
    return OrchestratorService(store, owner, recovery, observer, process_id)


async def serve(config: OrchestratorConfig, host: process.Host, shards: Directory) -> None:
    """Serves until the host says stop.

    Raises:
        OSError: the port is taken, or a file of the model cannot be read.
        ExceptionGroup: with the error of a part that failed, such as SessionStoreUnavailable at the start.
    """
    orchestrator = Orchestrator(config, shards)
    service = orchestrator.service
    async with asyncio.TaskGroup() as group:
        await service.start(group)
        gc.freeze()  # the vocabulary stays for ever; no collection needs to walk over it
        serving = process.Serving((orchestrator.port,), service.load)
        await process.run(orchestrator.server, serving, host, on_stop=service.drain)
        await orchestrator.close()
