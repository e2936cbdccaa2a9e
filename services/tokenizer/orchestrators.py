"""The orchestrators as one: calls that find somebody who answers, and the links that readers share (R8, R9).

Knows addresses, channels and what a failure of a call means; neither requests of clients nor tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import grpc
from grpc import aio

from services.common import rpc
from services.common.directory import Directory
from services.common.errors import Draining, FermataError, NoOrchestrator, OwnerChanged, OwnerElsewhere
from services.common.rpc_tracing import TraceClientInterceptor
from services.orchestrator.v1.orchestrator_pb2_grpc import OrchestratorServiceStub
from services.tokenizer.link import Link
from services.tokenizer.route import Route

if TYPE_CHECKING:
    from services.orchestrator.v1.orchestrator_pb2_grpc import OrchestratorServiceAsyncStub

ATTEMPT_TIMEOUT = 3.0
"""Seconds for one orchestrator to answer a call."""
GIVE_UP_AFTER = 10.0
"""Seconds for all attempts of a call together."""

_UNANSWERED = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)
"""Statuses that gRPC itself gives when the other side is gone; an orchestrator's own answers have details."""

Request = TypeVar("Request")
Response = TypeVar("Response")
Method: TypeAlias = "Callable[[OrchestratorServiceAsyncStub], aio.UnaryUnaryMultiCallable[Request, Response]]"


class Orchestrators:
    """All orchestrators that the directory knows.

    Attributes:
        directory: who is there.
    """

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self._stubs: dict[str, tuple[aio.Channel, OrchestratorServiceAsyncStub]] = {}
        self._links: dict[str, Link] = {}

    def link(self, address: str) -> Link:
        """The living link to an orchestrator, or a new one."""
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = Link(address, self._stub(address), self._forget)
        return link

    async def call(self, method: Method[Request, Response], request: Request, *, key: str) -> Response:
        """Calls whoever answers.

        Args:
            method: which call.
            request: must be safe to repeat.
            key: decides who is asked first (a session id).

        Raises:
            FermataError: the orchestrator's own answer.
            NoOrchestrator: nobody answered.
        """
        response, _ = await self.call_with_address(method, request, key=key)
        return response

    async def call_with_address(
        self, method: Method[Request, Response], request: Request, *, key: str
    ) -> tuple[Response, str]:
        """As `call`; returns the address that answered, too."""
        route = Route(self.directory, key)
        give_up_at = time.monotonic() + GIVE_UP_AFTER
        while (left := give_up_at - time.monotonic()) > 0:
            try:
                if not route.address:
                    delay = route.failed()
                else:
                    answer = method(self._stub(route.address))(request, timeout=min(ATTEMPT_TIMEOUT, left))
                    return await answer, route.address
            except aio.AioRpcError as error:
                delay = _next(route, error)
            await asyncio.sleep(delay)
        raise NoOrchestrator("no orchestrator answers; retry", retry_delay=1.0)

    async def ask_any(self, method: Method[Request, Response], request: Request, *, within: float) -> Response | None:
        """The first answer of any orchestrator, None when there is none in so many seconds. For what all know."""
        give_up_at = time.monotonic() + within
        addresses = self.directory.addresses()
        for index, address in enumerate(addresses):
            share = (give_up_at - time.monotonic()) / (len(addresses) - index)
            try:
                return await method(self._stub(address))(request, timeout=max(0.0, share))
            except aio.AioRpcError:
                continue
        return None

    def tick(self, now: float) -> None:
        """Called several times per second (`now` as of time.monotonic)."""
        for link in list(self._links.values()):
            link.tick(now)

    async def close(self) -> None:
        """Ends all links and connections."""
        await asyncio.gather(*(link.close() for link in list(self._links.values())))
        await asyncio.gather(*(channel.close() for channel, _ in self._stubs.values()))

    def _stub(self, address: str) -> OrchestratorServiceAsyncStub:
        if address not in self._stubs:
            channel = rpc.inside_channel(address, [TraceClientInterceptor()])
            self._stubs[address] = channel, OrchestratorServiceStub(channel)
        return self._stubs[address][1]

    def _forget(self, link: Link) -> None:
        if self._links.get(link.address) is link:
            del self._links[link.address]


def _next(route: Route, error: aio.AioRpcError) -> float:
    """What to do after a failed call: chooses the next address and returns the seconds to wait before it.

    Raises:
        FermataError: the failure is the answer.
    """
    answer: FermataError | None = rpc.from_call_error(error)
    if isinstance(answer, OwnerElsewhere) and answer.metadata.get("address"):
        return route.redirected(answer.metadata["address"])
    if isinstance(answer, (Draining, OwnerChanged)) or (answer is None and error.code() in _UNANSWERED):
        return route.failed()
    raise answer or rpc.internal_error(error)
