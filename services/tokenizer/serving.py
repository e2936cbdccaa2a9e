"""The wiring of one tokenizer, the public face of the system, in whatever process hosts it.

Knows how the parts are put together; `service.py` serves.
"""

from __future__ import annotations

import asyncio
import gc
import socket

from google.protobuf.descriptor import FileDescriptor
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fermata.v1 import generation_pb2, model_pb2, session_pb2, telemetry_pb2, text_pb2
from fermata.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from fermata.v1.model_pb2_grpc import add_ModelServiceServicer_to_server
from fermata.v1.session_pb2_grpc import add_SessionServiceServicer_to_server
from fermata.v1.telemetry_pb2_grpc import add_TelemetryServiceServicer_to_server
from fermata.v1.text_pb2_grpc import add_TokenizerServiceServicer_to_server
from services.common import process, rpc
from services.common.directory import Directory
from services.common.errors import Draining
from services.common.model_folder import find_model
from services.common.rpc_tracing import TraceInterceptor
from services.common.telemetry import Telemetry
from services.common.telemetry_service import Others, TelemetryService
from services.config import TokenizerConfig, telemetry_settings
from services.orchestrator.v1 import orchestrator_pb2
from services.tokenizer.codec import Codec
from services.tokenizer.figures import Figures
from services.tokenizer.orchestrators import Orchestrators
from services.tokenizer.reader import Face
from services.tokenizer.readers import Readers
from services.tokenizer.requests import internal_name, placement_key
from services.tokenizer.service import GenerationService, ModelService, SessionService, TokenizerService
from services.tokenizer.validation import check_name

LAST_CALL = 1.0
"""Seconds before the end of the grace at which streams that did not move are told to."""

_FILES: tuple[FileDescriptor, ...] = (
    generation_pb2.DESCRIPTOR,
    session_pb2.DESCRIPTOR,
    text_pb2.DESCRIPTOR,
    model_pb2.DESCRIPTOR,
    telemetry_pb2.DESCRIPTOR,
)
SERVICE_NAMES = tuple(name for file in _FILES for name in (f"{file.package}.{item}" for item in file.services_by_name))


class Tokenizer:
    """All that one process consists of, bound to its ports but not yet serving.

    Attributes:
        server: serves both ports.
        telemetry: what it tells of its work.
        public_port: shared with the other tokenizers of the node.
        own_port: this process's alone.
        readers: the open streams.
    """

    def __init__(self, config: TokenizerConfig, codec: Codec, orchestrators: Directory, tokenizers: Directory) -> None:
        """Binds the ports.

        Args:
            config: settings.
            codec: of the model.
            orchestrators: who they are.
            tokenizers: the own addresses of those that clients may resume at; this one may be among them.

        Raises:
            OSError: a port is taken.
        """
        self.telemetry = telemetry = Telemetry("tokenizer", telemetry_settings(config))
        figures = Figures(telemetry.metrics, lambda: len(self.readers))
        tracing = TraceInterceptor(telemetry, begins_traces=True, on_failed=figures.failed)
        self.server = rpc.public_server(reuse_port=True, interceptors=[tracing])
        self.public_port = rpc.bind(self.server, config.host, config.public_port)
        self.own_port = rpc.bind(self.server, config.host, config.port)
        self._orchestrators = Orchestrators(orchestrators)
        own = f"{advertised_host(config)}:{self.own_port}"
        face = Face(codec.vocabulary, codec.facts.eos_token_ids, own, tokenizers, telemetry, figures)
        self.readers = Readers(self._orchestrators, face)
        self._health = health.aio.HealthServicer()
        _add_services(self.server, codec, self._orchestrators, self.readers, self._health)
        others = Others(behind=orchestrators.addresses, beside=tokenizers.addresses)
        telemetry_service = TelemetryService(telemetry, own, others, self._generation_id)
        add_TelemetryServiceServicer_to_server(telemetry_service, self.server)
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to keep time and to say that all is well; the server itself is started by who runs it."""
        for name in ("", *SERVICE_NAMES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._ticker = asyncio.create_task(self.readers.tick(), name="ticker")

    async def _generation_id(self, name: generation_pb2.GenerationName) -> str:
        """The id of a generation, by whichever name."""
        check_name(name)
        if name.generation_id:
            return name.generation_id
        internal = internal_name(name)
        stored = await self._orchestrators.call(
            lambda stub: stub.GetGeneration,
            orchestrator_pb2.GetGenerationRequest(name=internal),
            key=placement_key(internal),
        )
        return stored.opened.generation_id

    async def drain(self) -> None:
        """R19: nothing new comes in, streams are told to move, and shortly before the end of the grace they must."""
        await self._health.enter_graceful_shutdown()
        self.readers.drain()
        error = Draining("this tokenizer leaves; resume at another one")
        asyncio.get_running_loop().call_later(process.STOP_GRACE - LAST_CALL, self.readers.end_all, error)

    async def close(self) -> None:
        """Ends what `start` began."""
        if self._ticker is not None:
            self._ticker.cancel()
        await self._orchestrators.close()
        await asyncio.to_thread(self.telemetry.close)


def _add_services(
    server: aio.Server,
    codec: Codec,
    orchestrators: Orchestrators,
    readers: Readers,
    health_servicer: health.aio.HealthServicer,
) -> None:
    add_GenerationServiceServicer_to_server(GenerationService(codec, orchestrators, readers), server)
    add_SessionServiceServicer_to_server(SessionService(orchestrators), server)
    add_TokenizerServiceServicer_to_server(TokenizerService(codec), server)
    add_ModelServiceServicer_to_server(ModelService(codec, orchestrators), server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = (*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)


def advertised_host(config: TokenizerConfig) -> str:
    """The host that clients are told."""
    host = config.advertised_host or config.host
    return socket.gethostname() if host in ("0.0.0.0", "::", "[::]") else host


async def serve(config: TokenizerConfig, host: process.Host, orchestrators: Directory, tokenizers: Directory) -> None:
    """Serves until the host says stop.

    Raises:
        OSError: a port is taken, or a file of the model cannot be read.
        ValueError: the model has no tokenizer that works.
    """
    codec = await asyncio.to_thread(Codec.load, find_model(config.model))
    tokenizer = Tokenizer(config, codec, orchestrators, tokenizers)
    await tokenizer.start()
    gc.freeze()  # what is there now stays for ever; no collection needs to walk over it
    serving = process.Serving((tokenizer.public_port, tokenizer.own_port), lambda: {"streams": len(tokenizer.readers)})
    try:
        await process.run(tokenizer.server, serving, host, on_stop=tokenizer.drain)
    finally:
        await tokenizer.close()
