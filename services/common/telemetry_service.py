"""What a process remembers and counts, for those who ask: its own, and that of the processes behind it.

Every process answers for itself and asks the next room in the line, so that a tokenizer answers for the whole system.
Knows calls; neither what is counted nor what spans mean.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from grpc import aio

from fermata.v1 import generation_pb2, telemetry_pb2
from fermata.v1.telemetry_pb2_grpc import TelemetryServiceServicer, TelemetryServiceStub
from services.common import otlp, rpc
from services.common.errors import GenerationNotFound
from services.common.metrics import Figure, Kind
from services.common.telemetry import Telemetry
from services.common.types import VERSION

if TYPE_CHECKING:
    from fermata.v1.telemetry_pb2_grpc import TelemetryServiceAsyncStub

PATIENCE = 2.0
"""Seconds that another process has to answer; what it would have said is missing then."""

Answer = TypeVar("Answer")
Resolve = Callable[[generation_pb2.GenerationName], Awaitable[str]]

_KINDS = {
    Kind.COUNTER: telemetry_pb2.Figure.KIND_COUNTER,
    Kind.GAUGE: telemetry_pb2.Figure.KIND_GAUGE,
    Kind.HISTOGRAM: telemetry_pb2.Figure.KIND_HISTOGRAM,
}


@dataclass(frozen=True, slots=True)
class Others:
    """Whom a process asks.

    Attributes:
        behind: addresses of the next room; each answers for those behind it, too.
        beside: addresses of this room, which answer for themselves alone; the process's own may be among them.
    """

    behind: Callable[[], Sequence[str]] = tuple
    beside: Callable[[], Sequence[str]] = tuple


class TelemetryService(TelemetryServiceServicer):
    """Answers for one process."""

    def __init__(
        self, telemetry: Telemetry, address: str, others: Others | None = None, resolve: Resolve | None = None
    ) -> None:
        """Answers for a process.

        Args:
            telemetry: what it remembers and counts.
            address: its own, HOST:PORT.
            others: whom it asks.
            resolve: gives the id of a generation by any of its names; None where only ids are used.
        """
        self._telemetry, self._address, self._resolve = telemetry, address, resolve
        self._others = others or Others()

    async def GetStatistics(
        self, request: telemetry_pb2.GetStatisticsRequest, context: rpc.Context
    ) -> telemetry_pb2.GetStatisticsResponse:
        """The figures of all processes that answer."""
        response = telemetry_pb2.GetStatisticsResponse(replicas=[self._replica()])
        if request.here_only:
            return response

        async def ask(stub: TelemetryServiceAsyncStub, here_only: bool) -> Sequence[telemetry_pb2.Replica]:
            asked = telemetry_pb2.GetStatisticsRequest(here_only=here_only)
            return (await stub.GetStatistics(asked, timeout=PATIENCE)).replicas

        known = {self._address}
        for replicas in await self._ask_others(ask):
            for replica in replicas:
                if replica.address not in known:  # two of the next room have the same behind them
                    known.add(replica.address)
                    response.replicas.append(replica)
        return response

    async def GetTrace(
        self, request: telemetry_pb2.GetTraceRequest, context: rpc.Context
    ) -> telemetry_pb2.GetTraceResponse:
        """The spans of a generation, from all processes that answer.

        Raises:
            GenerationNotFound: nobody remembers any.
        """
        name = request.generation
        generation_id = await self._resolve(name) if self._resolve is not None else name.generation_id
        documents = [self._telemetry.document(generation_id)]
        if not request.here_only:

            async def ask(stub: TelemetryServiceAsyncStub, here_only: bool) -> bytes:
                name = generation_pb2.GenerationName(generation_id=generation_id)
                asked = telemetry_pb2.GetTraceRequest(generation=name, here_only=here_only)
                return (await stub.GetTrace(asked, timeout=PATIENCE)).otlp_json

            documents += await self._ask_others(ask)
            if not any(documents):
                raise GenerationNotFound(
                    "no process remembers a span of this generation; they are kept while there is memory for them",
                    metadata={"generation_id": generation_id},
                )
        found = [document for document in documents if document]
        return telemetry_pb2.GetTraceResponse(otlp_json=otlp.join_documents(found) if found else b"")

    def _replica(self) -> telemetry_pb2.Replica:
        return telemetry_pb2.Replica(
            service=self._telemetry.service,
            address=self._address,
            node=socket.gethostname(),
            pid=os.getpid(),
            version=VERSION,
            figures=[_message(figure) for figure in self._telemetry.metrics.collect()],
        )

    async def _ask_others(self, ask: Callable[[TelemetryServiceAsyncStub, bool], Awaitable[Answer]]) -> list[Answer]:
        """The answers of those who answer."""
        asked = [(address, False) for address in self._others.behind()]
        asked += [(address, True) for address in self._others.beside() if address != self._address]

        async def one(address: str, here_only: bool) -> Answer | None:
            channel = rpc.inside_channel(address)
            try:
                return await ask(TelemetryServiceStub(channel), here_only)
            except aio.AioRpcError:
                return None
            finally:
                await channel.close()

        answers = await asyncio.gather(*(one(address, here_only) for address, here_only in asked))
        return [answer for answer in answers if answer is not None]


def _message(figure: Figure) -> telemetry_pb2.Figure:
    return telemetry_pb2.Figure(
        name=figure.name.name,
        unit=figure.name.unit,
        kind=_KINDS[figure.kind],
        attributes=figure.attributes,
        value=figure.value,
        bounds=figure.bounds,
        counts=figure.counts,
        total=figure.total,
    )
