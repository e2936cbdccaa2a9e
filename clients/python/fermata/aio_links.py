"""Connections of the async client: one per place, shared by its streams, replaced when broken; and calls on them.

Knows channels, dials and unary calls. Who goes where, and when, is decided in `resume.py`.
"""

# ruff: noqa: ASYNC109 - a timeout is also the deadline that the server is told
from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

from grpc import aio

from fermata import dialing
from fermata.dialing import NO_ANSWER, Health, LinkTable
from fermata.errors import DeadlineExceeded, FermataError, Unavailable, from_rpc_error
from fermata.resume import DIAL_TIMEOUT, Endpoint, Recovery, Where, candidates
from fermata.trace_context import trace_metadata
from fermata.v1.generation_pb2_grpc import GenerationServiceStub
from fermata.v1.model_pb2_grpc import ModelServiceStub
from fermata.v1.session_pb2_grpc import SessionServiceStub
from fermata.v1.telemetry_pb2_grpc import TelemetryServiceStub
from fermata.v1.text_pb2_grpc import TokenizerServiceStub

Request = TypeVar("Request")
Response = TypeVar("Response")
Method = Callable[["Link"], "aio.UnaryUnaryMultiCallable[Request, Response]"]
"""Picks a call from a link's stubs."""


class Link:
    """One connection with its stubs."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.channel = aio.insecure_channel(endpoint.address, options=dialing.CHANNEL_OPTIONS)
        self.generations = GenerationServiceStub(self.channel)
        self.sessions = SessionServiceStub(self.channel)
        self.texts = TokenizerServiceStub(self.channel)
        self.models = ModelServiceStub(self.channel)
        self.telemetry = TelemetryServiceStub(self.channel)

    async def dial(self) -> Health:
        """Asks the other end whether it serves; at most `DIAL_TIMEOUT` seconds."""
        check: aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(dialing.HEALTH_CHECK)
        try:
            return dialing.health_of(await check(dialing.HEALTH_REQUEST, timeout=DIAL_TIMEOUT))
        except aio.AioRpcError as error:
            return dialing.health_after(error.code())


class Links:
    """The links of one client, in one event loop.

    Attributes:
        home: HOST:PORT that the client was given.
        known: endpoints that the server told last, the speaker first.
        give_up_after: seconds of trouble without progress after which the caller is told.
    """

    def __init__(self, home: str, give_up_after: float) -> None:
        self.home = home
        self.give_up_after = give_up_after
        self.known: tuple[str, ...] = ()
        self._table = LinkTable(home, Link)
        self._closing: set[asyncio.Task[None]] = set()

    def hold(self, endpoint: Endpoint | None = None) -> Link:
        """The link to a place, made when there is none; the client's own address without an argument."""
        return self._table.hold(endpoint or self._table.home)

    def release(self, link: Link) -> None:
        """Gives a held link back; the last one out closes it."""
        if self._table.release(link):
            task = asyncio.ensure_future(link.channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def discard(self, link: Link) -> None:
        """Nobody shall get this link any more; who holds it may go on."""
        self._table.discard(link)

    async def race(self, endpoints: Iterable[Endpoint], *, serving_only: bool = False) -> Link:
        """Dials two places at a time and returns the first link that answers, held.

        A place that answers NOT_SERVING is taken only when no other answers, and never with `serving_only`.

        Raises:
            Unavailable: none answered.
        """
        waiting = deque(endpoints)
        dials: dict[asyncio.Task[Health], Link] = {}
        last_resort: list[Link] = []
        tried: list[str] = []
        try:
            while waiting or dials:
                while waiting and len(dials) < dialing.PARALLEL_DIALS:
                    link = self.hold(waiting.popleft())
                    tried.append(link.endpoint.address)
                    dials[asyncio.ensure_future(link.dial())] = link
                done, _ = await asyncio.wait(dials, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    link = dials.pop(task)
                    health = task.result()
                    if health is Health.SERVING:
                        return link
                    if health is Health.NOT_SERVING:
                        last_resort.append(link)
                    else:
                        self.discard(link)
                        self.release(link)
            if last_resort and not serving_only:
                return last_resort.pop()
            raise dialing.unreachable(tried, answered=bool(last_resort))
        finally:
            for task, link in dials.items():
                task.cancel()
                self.release(link)
            for link in last_resort:
                self.release(link)

    async def call(self, method: Method[Request, Response], request: Request, timeout: float | None = None) -> Response:
        """Makes a unary call that may be repeated, and repeats it over a broken link.

        Raises:
            DeadlineExceeded: `timeout` seconds passed; without it, one attempt took longer than `give_up_after`.
            FermataError: what the server said.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        try:
            async with asyncio.timeout(timeout):
                return await self._call(method, request, deadline)
        except TimeoutError:
            raise DeadlineExceeded(NO_ANSWER, reason="") from None

    async def _call(self, method: Method[Request, Response], request: Request, deadline: float) -> Response:
        recovery = Recovery(self.give_up_after)
        link: Link | None = self.hold()
        failed = ""
        try:
            while True:
                error: FermataError
                try:
                    if link is None:
                        link = await self.race(candidates(self.home, self.known, failed))
                    limit = min(self.give_up_after, max(0.0, deadline - time.monotonic()))
                    return await method(link)(request, timeout=limit, metadata=trace_metadata())
                except aio.AioRpcError as rpc_error:
                    error = from_rpc_error(rpc_error)
                except Unavailable as unreachable:
                    error = unreachable
                remedy = recovery.remedy(error, started=False, now=time.monotonic())
                if link is not None and remedy.where is Where.OTHER_LINK:
                    failed = link.endpoint.address
                    self.discard(link)
                    self.release(link)
                    link = None
                await asyncio.sleep(remedy.delay)
        finally:
            if link is not None:
                self.release(link)

    async def close(self) -> None:
        """Closes every connection; calls on them end."""
        for link in self._table.clear():
            await link.channel.close()
        if self._closing:
            await asyncio.gather(*self._closing)
