"""A reader written after `clients/RESUME.md` and the public protos alone: raw stubs, no part of the client library.

It does what that page says and nothing beyond it, so that what it cannot do is missing from the page.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fermata.v1 import generation_pb2 as pb
from fermata.v1.generation_pb2_grpc import GenerationServiceStub
from tests.contract.statuses import error_info, retry_delay

SILENCE = 3.0
GIVE_UP_AFTER = 60.0
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1), ("grpc.keepalive_time_ms", 10_000)]
SAME_ENDPOINT = {"OWNER_CHANGED", "SLOW_READER", "SESSION_STORE_UNAVAILABLE", "NO_SHARD", "NEED_FROM"}
OTHER_ENDPOINT = {"DRAINING", "NO_ORCHESTRATOR"}
BROKEN_LINK = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL}


class DeadLinkError(Exception):
    """Silence, an end before the end, a message that is missing, or a tokenizer that is about to leave."""


class DivergedError(Exception):
    """What came does not continue what is here."""


def extend(running_hash: bytes, token_id: int) -> bytes:
    return hashlib.sha256(running_hash + struct.pack("<I", token_id)).digest()[:8]


@dataclass
class Choice:
    """What the reader has of one choice."""

    token_ids: list[int] = field(default_factory=list)
    running_hash: bytes = bytes(8)
    text: str = ""
    finished: pb.Finished | None = None

    @property
    def count(self) -> int:
        return len(self.token_ids)

    def append(self, token_ids: Iterable[int], running_hash: bytes | None = None) -> None:
        """Adds ids, if they give this hash."""
        token_ids, extended = list(token_ids), self.running_hash
        for token_id in token_ids:
            extended = extend(extended, token_id)
        if running_hash not in (None, extended):
            raise DivergedError(f"after {self.count} tokens")
        self.token_ids += token_ids
        self.running_hash = extended


class RawReader:
    """Reads one generation: a new one (with `request`), or one that exists (with `name`).

    Attributes:
        choices: what it has, by choice.
        events: kinds of all events that came, in order.
        answers: reasons of the calls that failed.
        spoke: the address of each call.
        durable: the last durable_count, by choice.
        endpoints: as the server told last.
    """

    def __init__(
        self, home: str, *, request: pb.GenerationRequest | None = None, name: pb.GenerationName | None = None
    ) -> None:
        self.choices: defaultdict[int, Choice] = defaultdict(Choice)
        self.started: pb.Started | None = None
        self.events: list[str] = []
        self.answers: list[str] = []
        self.spoke: list[str] = []
        self.durable: dict[int, int] = {}
        self.endpoints: list[str] = []
        self._home = home
        self._request = request
        self._name = name
        self._resumes = request is None
        if request is not None:
            self._name = pb.GenerationName(request_id=request.request_id, session_id=request.session_id)
        self._missing: dict[int, int] = {}
        self._tries = 0

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        ended = sum(choice.finished is not None for choice in self.choices.values())
        return self.started is not None and ended == self.started.n

    @property
    def name(self) -> pb.GenerationName | None:
        """How to name the generation: by its id once that is known."""
        return pb.GenerationName(generation_id=self.started.generation_id) if self.started else self._name

    def resume_request(self) -> pb.ResumeRequest:
        """The cursors, and the tails that were asked for."""
        request = pb.ResumeRequest(generation=self.name)
        for index, choice in self.choices.items():
            if choice.count:
                request.cursors.add(choice=index, count=choice.count, running_hash=choice.running_hash)
        for index, count in self._missing.items():
            request.tails.add(choice=index, first_offset=count, token_ids=self.choices[index].token_ids[count:])
        return request

    def need_from(self, info: error_details_pb2.ErrorInfo) -> None:
        """The log lacks what is behind this count."""
        self._missing[int(info.metadata["choice"])] = int(info.metadata["count"])

    async def read(self, until: Callable[[RawReader], bool] = lambda _: False) -> RawReader:
        """Reads to the end, or until something holds, whatever breaks on the way."""
        address, delay = self._home, 0.0
        async with asyncio.timeout(GIVE_UP_AFTER):
            while not self.complete and not until(self):
                await asyncio.sleep(delay)
                try:
                    await self.call(address, until)
                except (DeadLinkError, aio.AioRpcError) as error:
                    delay, moves = self._remedy(error)
                    if moves:
                        address = await self._another(address)
        return self

    async def call(self, address: str, until: Callable[[RawReader], bool] = lambda _: False) -> None:
        """One call, to its end or until something holds."""
        self.spoke.append(address)
        async with aio.insecure_channel(address, options=OWN_CONNECTION) as channel:
            stub = GenerationServiceStub(channel)
            call: Any = (
                stub.Resume(self.resume_request())
                if self._resumes
                else stub.StreamGenerate(pb.StreamGenerateRequest(generation=self._request))
            )
            while not until(self):
                try:
                    response = await asyncio.wait_for(call.read(), SILENCE)
                except TimeoutError:
                    raise DeadLinkError("silence") from None
                if response is aio.EOF:
                    if not self.complete:
                        raise DeadLinkError("early end")
                    return
                self.take(response.event)
            call.cancel()

    def take(self, event: pb.GenerationEvent) -> None:
        """One event, as a whole or not at all."""
        kind = event.WhichOneof("event")
        self.events.append(str(kind))
        if kind == "started":
            self.started, self._resumes = event.started, True
            self.endpoints = list(event.started.endpoints)
            self._missing.clear()
        elif kind == "tokens":
            self._take_tokens(event.tokens)
        elif kind == "finished":
            self._take_finished(event.finished)
        elif kind == "heartbeat":
            self.endpoints = list(event.heartbeat.endpoints) or self.endpoints
            if event.heartbeat.draining:
                raise DeadLinkError("about to leave")

    def _take_tokens(self, tokens: pb.Tokens) -> None:
        choice = self.choices[tokens.choice]
        assert choice.finished is None, "tokens after the end"
        if tokens.first_offset != choice.count:
            raise DeadLinkError("a message is missing")
        choice.append(tokens.token_ids, tokens.running_hash)
        choice.text += tokens.text
        self.durable[tokens.choice] = tokens.durable_count
        self._tries = 0

    def _take_finished(self, finished: pb.Finished) -> None:
        choice = self.choices[finished.choice]
        if choice.finished is not None:
            return
        nothing_to_compare = not choice.count and (self._request is None or self._request.output.final_only)
        if not nothing_to_compare and finished.count > choice.count:
            raise DeadLinkError("a message is missing")
        if not nothing_to_compare and (finished.count, finished.running_hash) != (choice.count, choice.running_hash):
            raise DivergedError(f"ended after {finished.count} tokens")
        choice.text += finished.text
        choice.finished = finished
        self._tries = 0

    def _remedy(self, error: Exception) -> tuple[float, bool]:
        """Seconds to wait and whether to go elsewhere; raises the error when it is final."""
        reason, least, moves = "", 0.0, True
        if isinstance(error, aio.AioRpcError):
            info = error_info(error)
            reason, least = info.reason, retry_delay(error)
            broken = not reason and error.code() in BROKEN_LINK
            moves = broken or reason in OTHER_ENDPOINT
            overloaded = reason == "OVERLOADED" and self.started is not None
            if not (moves or reason in SAME_ENDPOINT or overloaded):
                raise error
            if reason == "NEED_FROM":
                self.need_from(info)
        self.answers.append(reason or str(error))
        longest = min(1.0, 0.05 * 2.0 ** (self._tries - 1)) if self._tries else 0.0
        self._tries += 1
        return max(least, longest * random.uniform(0.5, 1.0)), moves

    async def _another(self, failed: str) -> str:
        """The first endpoint that says that it serves: the others before the one that failed."""
        others = [address for address in dict.fromkeys([*self.endpoints, self._home]) if address != failed]
        for address in [*others, failed]:
            async with aio.insecure_channel(address, options=OWN_CONNECTION) as channel:
                health: Any = health_pb2_grpc.HealthStub(channel)
                try:
                    answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
                except aio.AioRpcError:
                    continue
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return address
        return failed
