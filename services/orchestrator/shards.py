"""Links to the shards: one persistent stream each, commands batched per wake-up, results handed on as they come.

Knows the shard's messages and whether it is alive; not what a generation is. A link is never resumed (R11): when it
breaks, all its admissions are gone, and its listener is told once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from grpc import aio

from services.common import rpc
from services.common.errors import FermataError
from services.common.types import Fingerprint
from services.orchestrator.convert import fingerprint_from_message
from services.orchestrator.placement import ShardView
from services.shard.v1 import shard_pb2
from services.shard.v1.shard_pb2_grpc import ShardServiceStub

if TYPE_CHECKING:
    from services.shard.v1.shard_pb2_grpc import ShardServiceAsyncStub

log = logging.getLogger(__name__)

SILENCE_LIMIT = 3.0
"""Seconds without any message after which a link counts as dead (R7: the other end speaks each second)."""
_CONNECT_TIMEOUT = 1.0
_FIRST_RETRY, _LAST_RETRY = 0.05, 0.5


class LinkListener(Protocol):
    """Who is told what comes over a link. Called on the event loop; must not block."""

    def on_ready(self, link: ShardLink) -> None:
        """The link can take admissions."""

    def on_admitted(self, link: ShardLink, admitted: shard_pb2.Admitted) -> None:
        """An admission got its blocks."""

    def on_steps(self, link: ShardLink, response: shard_pb2.LinkResponse, arrived_ns: int) -> None:
        """Tokens, which arrived with this message."""

    def on_ended(self, link: ShardLink, attempt: int, error: FermataError) -> None:
        """An admission ended by itself."""

    def on_broken(self, link: ShardLink) -> None:
        """The link is gone, with all its admissions."""


class ShardLink:
    """One shard, as this process reaches it.

    Attributes:
        address: HOST:PORT.
        ready: admissions can be sent.
        process_id: of the shard; names its monotonic clock, too (R25).
        fingerprint, context_length, vocabulary_size: as the shard describes itself; meaningful once it was ready.
    """

    _attempts = itertools.count(1)

    def __init__(self, address: str, listener: LinkListener) -> None:
        self.address = address
        self.ready = False
        self.process_id = ""
        self.fingerprint = Fingerprint()
        self.context_length = 0
        self.vocabulary_size = 0
        self._listener = listener
        self._load = shard_pb2.Load()
        self._capacity = 1
        self._draining = False
        self._admitted = 0
        self._wake = asyncio.Event()
        self._admits: list[shard_pb2.Admit] = []
        self._grants: dict[int, int] = {}
        self._releases: list[int] = []
        self._traced: list[str] = []
        self._last_message = time.monotonic()
        self._call: aio.StreamStreamCall[shard_pb2.LinkRequest, shard_pb2.LinkResponse] | None = None

    @property
    def view(self) -> ShardView:
        """What placement needs to know."""
        return ShardView(
            self.address,
            self.fingerprint,
            waiting=self._load.waiting,
            running=self._load.running,
            capacity=self._capacity,
            draining=self._draining,
        )

    def admit(self, admit: shard_pb2.Admit) -> int:
        """Queues an admission and returns its attempt, which no other admission of this process has."""
        admit.attempt = next(self._attempts)
        self._admits.append(admit)
        self._wake.set()
        return admit.attempt

    def grant(self, attempt: int, count: int) -> None:
        """Queues a new absolute grant (R11)."""
        self._grants[attempt] = count
        self._wake.set()

    def release(self, attempt: int) -> None:
        """Queues the end of an admission."""
        self._grants.pop(attempt, None)
        self._releases.append(attempt)
        self._wake.set()

    def trace(self, generation_ids: Iterable[str]) -> None:
        """Queues generations whose steps shall be handed to the collector of spans."""
        self._traced.extend(generation_ids)
        self._wake.set()

    def check_silence(self, now: float) -> None:
        """Cuts the link when the shard has said nothing for too long (`now` as of time.monotonic)."""
        if self._call is not None and now - self._last_message > SILENCE_LIMIT:
            log.warning("shard %s is silent, cutting the link", self.address)
            self._call.cancel()

    async def run(self) -> None:
        """Keeps the link up until cancelled."""
        delay = _FIRST_RETRY
        while True:
            channel = rpc.inside_channel(self.address)
            try:
                stub = ShardServiceStub(channel)
                self._describe(await stub.Describe(shard_pb2.DescribeRequest(), timeout=_CONNECT_TIMEOUT))
                delay = _FIRST_RETRY
                await self._serve(stub)
            except (aio.AioRpcError, asyncio.InvalidStateError) as error:
                log.debug("shard %s: %s", self.address, error)
            finally:
                await channel.close()
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LAST_RETRY)

    def _describe(self, description: shard_pb2.DescribeResponse) -> None:
        self.process_id = description.process_id
        self.fingerprint = fingerprint_from_message(description.fingerprint)
        self.context_length = description.context_length
        self.vocabulary_size = description.vocabulary_size
        self._capacity = description.step_sequences

    async def _serve(self, stub: ShardServiceAsyncStub) -> None:
        """Runs one stream to its end."""
        self._call = call = stub.Link()
        self._admits, self._grants, self._releases = [], {}, []
        self._load, self._draining = shard_pb2.Load(), False
        self._last_message = time.monotonic()
        writer = asyncio.create_task(self._write(call))
        log.info("shard %s: linked, fingerprint %s", self.address, self.fingerprint)
        self.ready = True
        try:
            self._listener.on_ready(self)
            async for response in call:
                self._take(response)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # this task is told to stop; a call that was cut for its silence ends here
        finally:
            self.ready, self._call = False, None
            writer.cancel()
            call.cancel()
            log.warning("shard %s: link lost", self.address)
            self._listener.on_broken(self)

    async def _write(self, call: aio.StreamStreamCall[shard_pb2.LinkRequest, shard_pb2.LinkResponse]) -> None:
        """Sends what was queued, one message per wake-up."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                request = shard_pb2.LinkRequest(
                    admits=self._admits, releases=self._releases, traced_generations=self._traced
                )
                if self._grants:
                    request.grants.attempts.extend(self._grants.keys())
                    request.grants.counts.extend(self._grants.values())
                self._admits, self._grants, self._releases, self._traced = [], {}, [], []
                await call.write(request)
        except (aio.AioRpcError, asyncio.InvalidStateError):
            call.cancel()  # the reading side notices and ends the link

    def _take(self, response: shard_pb2.LinkResponse) -> None:
        """Hands one message to the listener."""
        arrived_ns = time.monotonic_ns()
        self._last_message = arrived_ns / 1e9
        self._draining = response.draining
        for admitted in response.admitted:
            self._listener.on_admitted(self, admitted)
        if response.steps:
            self._listener.on_steps(self, response, arrived_ns)
        for ended in response.ended:
            self._listener.on_ended(self, ended.attempt, rpc.from_status(ended.status))
        if response.HasField("load"):
            self._load = response.load
