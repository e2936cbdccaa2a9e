"""Connections of the sync client: one per place, shared by its streams, replaced when broken; and calls on them.

Knows channels, dials and unary calls. Who goes where, and when, is decided in `resume.py`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any, TypeVar

import grpc

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
Method = Callable[["Link"], "grpc.UnaryUnaryMultiCallable[Request, Response]"]
"""Picks a call from a link's stubs."""


class Link:
    """One connection with its stubs."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.channel = grpc.insecure_channel(endpoint.address, options=dialing.CHANNEL_OPTIONS)
        self.generations = GenerationServiceStub(self.channel)
        self.sessions = SessionServiceStub(self.channel)
        self.texts = TokenizerServiceStub(self.channel)
        self.models = ModelServiceStub(self.channel)
        self.telemetry = TelemetryServiceStub(self.channel)

    def dial(self, timeout: float) -> Any:
        """Starts asking the other end whether it serves; a future that ends within `timeout` seconds."""
        check: Any = self.channel.unary_unary(dialing.HEALTH_CHECK)
        return check.future(dialing.HEALTH_REQUEST, timeout=timeout)


def _found(dial: Any) -> Health:
    """What a dial that has ended found."""
    code = dial.code()
    return dialing.health_of(dial.result()) if code is grpc.StatusCode.OK else dialing.health_after(code)


def sleep_until(moment: float, deadline: float) -> None:
    """Sleeps until a moment of the monotonic clock.

    Raises:
        DeadlineExceeded: the deadline comes first, or has passed.
    """
    if moment >= deadline:
        time.sleep(max(0.0, deadline - time.monotonic()))
        raise DeadlineExceeded(NO_ANSWER, reason="")
    time.sleep(max(0.0, moment - time.monotonic()))


class Links:
    """The links of one client. Any thread may call.

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

    def hold(self, endpoint: Endpoint | None = None) -> Link:
        """The link to a place, made when there is none; the client's own address without an argument."""
        return self._table.hold(endpoint or self._table.home)

    def release(self, link: Link) -> None:
        """Gives a held link back; the last one out closes it."""
        if self._table.release(link):
            link.channel.close()

    def discard(self, link: Link) -> None:
        """Nobody shall get this link any more; who holds it may go on."""
        self._table.discard(link)

    def race(self, endpoints: Iterable[Endpoint], *, deadline: float = math.inf, serving_only: bool = False) -> Link:
        """Dials two places at a time and returns the first link that answers, held.

        A place that answers NOT_SERVING is taken only when no other answers, and never with `serving_only`.

        Raises:
            Unavailable: none answered.
            DeadlineExceeded: none did before `deadline` on the monotonic clock.
        """
        waiting = deque(endpoints)
        dials: dict[Any, Link] = {}
        ended: SimpleQueue[Any] = SimpleQueue()
        last_resort: list[Link] = []
        tried: list[str] = []
        try:
            while waiting or dials:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise DeadlineExceeded(NO_ANSWER, reason="")
                while waiting and len(dials) < dialing.PARALLEL_DIALS:
                    link = self.hold(waiting.popleft())
                    tried.append(link.endpoint.address)
                    dial = link.dial(min(DIAL_TIMEOUT, remaining))
                    dials[dial] = link
                    dial.add_done_callback(ended.put)
                dial = ended.get()
                link, health = dials.pop(dial), _found(dial)
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
            for dial, link in dials.items():
                dial.cancel()
                self.release(link)
            for link in last_resort:
                self.release(link)

    def call(self, method: Method[Request, Response], request: Request, timeout: float | None = None) -> Response:
        """Makes a unary call that may be repeated, and repeats it over a broken link.

        Raises:
            DeadlineExceeded: `timeout` seconds passed; without it, one attempt took longer than `give_up_after`.
            FermataError: what the server said.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        recovery = Recovery(self.give_up_after)
        link: Link | None = self.hold()
        failed = ""
        try:
            while True:
                error: FermataError
                try:
                    if link is None:
                        link = self.race(candidates(self.home, self.known, failed), deadline=deadline)
                    limit = min(self.give_up_after, max(0.0, deadline - time.monotonic()))
                    return method(link)(request, timeout=limit, metadata=trace_metadata())
                except grpc.RpcError as rpc_error:
                    error = from_rpc_error(rpc_error)
                except Unavailable as unreachable:
                    error = unreachable
                remedy = recovery.remedy(error, started=False, now=time.monotonic())
                if link is not None and remedy.where is Where.OTHER_LINK:
                    failed = link.endpoint.address
                    self.discard(link)
                    self.release(link)
                    link = None
                sleep_until(time.monotonic() + remedy.delay, deadline)
        finally:
            if link is not None:
                self.release(link)

    def close(self) -> None:
        """Closes every connection; calls on them end."""
        for link in self._table.clear():
            link.channel.close()
