"""A shard without a model: a real gRPC server whose next token is a hash of what it knows.

Deterministic, so that any two of them give the same tokens for the same admission. Records what it was told.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fermata.v1 import common_pb2
from services.common import rpc
from services.common.errors import Draining, FermataError
from services.common.types import unpack_ids
from services.shard.v1 import shard_pb2
from services.shard.v1.shard_pb2_grpc import ShardServiceServicer, add_ShardServiceServicer_to_server

VOCABULARY = 64


def next_token(known: list[int], seed: int, choice: int, position: int) -> int:
    """The id that every fake shard draws here: never 0, which tests use as the stop token."""
    digest = hashlib.sha256(repr((known[-3:], seed, choice, position)).encode()).digest()
    return digest[0] % (VOCABULARY - 1) + 1


def expected_output(context: list[int], seed: int, count: int, choice: int = 0) -> list[int]:
    """What an undisturbed generation gives."""
    known = list(context)
    for _ in range(count):
        known.append(next_token(known, seed, choice, len(known)))
    return known[len(context) :]


@dataclass
class Running:
    """One admission."""

    admit: shard_pb2.Admit
    known: list[int]
    grant: int

    @property
    def count(self) -> int:
        return len(self.known) - self.admit.output_start


@dataclass
class FakeShard(ShardServiceServicer):
    """See the module.

    Attributes:
        pace: seconds per step.
        weights: part of the fingerprint.
        silent: says nothing any more, as a stopped process.
        fail_at: output count at which every admission ends with this error; with `Draining` it says that, too.
        admits, releases: what it was told.
        grants: the attempts of each message that had some.
        admitted: admissions that run now, by attempt.
    """

    pace: float = 0.0
    weights: str = "w"
    silent: bool = False
    fail_at: tuple[int, FermataError] | None = None
    address: str = ""
    admits: list[shard_pb2.Admit] = field(default_factory=list)
    releases: list[int] = field(default_factory=list)
    grants: list[list[int]] = field(default_factory=list)
    admitted: dict[int, Running] = field(default_factory=dict)

    async def start(self, port: int = 0) -> None:
        """Listens; with a port, where another one did before."""
        self._server = rpc.inside_server()
        add_ShardServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{rpc.bind(self._server, '127.0.0.1', port)}"
        await self._server.start()

    async def drop(self) -> None:
        """Goes away without grace."""
        await self._server.stop(None)
        self.admitted.clear()

    async def Describe(self, request: shard_pb2.DescribeRequest, context: rpc.Context) -> shard_pb2.DescribeResponse:
        fingerprint = common_pb2.Fingerprint(model="fake", weights=self.weights, parallel_degree=1, noise_version=1)
        return shard_pb2.DescribeResponse(
            fingerprint=fingerprint, context_length=512, vocabulary_size=VOCABULARY, block_size=16, step_sequences=64
        )

    async def Link(
        self, request_iterator: AsyncIterator[shard_pb2.LinkRequest], context: rpc.Context
    ) -> AsyncIterator[shard_pb2.LinkResponse]:
        mine: dict[int, Running] = {}
        wake = asyncio.Event()
        taking = asyncio.create_task(self._take(request_iterator, mine, wake))
        try:
            while True:
                response = self._step(mine)
                if response.steps or response.ended or response.admitted:
                    if self.silent:
                        await asyncio.sleep(3600)
                    yield response
                    await asyncio.sleep(self.pace)
                    continue
                wake.clear()
                try:
                    async with asyncio.timeout(0.3):
                        await wake.wait()
                except TimeoutError:
                    if not self.silent:
                        yield shard_pb2.LinkResponse(load=shard_pb2.Load(running=len(mine)))
        finally:
            taking.cancel()
            for attempt in mine:
                self.admitted.pop(attempt, None)

    async def _take(
        self, requests: AsyncIterator[shard_pb2.LinkRequest], mine: dict[int, Running], wake: asyncio.Event
    ) -> None:
        async for request in requests:
            for admit in request.admits:
                self.admits.append(admit)
                mine[admit.attempt] = Running(admit, unpack_ids(admit.token_ids), admit.grant)
                self.admitted[admit.attempt] = mine[admit.attempt]
            if request.HasField("grants"):
                self.grants.append(list(request.grants.attempts))
            for attempt, count in zip(request.grants.attempts, request.grants.counts, strict=True):
                if attempt in mine:
                    mine[attempt].grant = count
            for attempt in request.releases:
                self.releases.append(attempt)
                mine.pop(attempt, None)
                self.admitted.pop(attempt, None)
            wake.set()

    def _step(self, mine: dict[int, Running]) -> shard_pb2.LinkResponse:
        """One token for each admission that has a grant."""
        response = shard_pb2.LinkResponse()
        response.draining = self.fail_at is not None and isinstance(self.fail_at[1], Draining)
        step = shard_pb2.Step(number=1, departed_ns=1)
        for attempt, running in list(mine.items()):
            admit = running.admit
            if self.fail_at is not None and running.count >= self.fail_at[0]:
                response.ended.add(attempt=attempt, status=rpc.to_status(self.fail_at[1]))
                self._end(mine, attempt)
            elif running.count < running.grant:
                position = len(running.known)
                running.known.append(next_token(running.known, admit.sampling.seed, admit.choice, position))
                step.attempts.append(attempt)
                step.token_ids.append(running.known[-1])
                step.counts.append(running.count)
                if running.known[-1] in admit.stop_token_ids or running.count >= admit.max_count:
                    self._end(mine, attempt)
        if step.attempts:
            response.steps.append(step)
        return response

    def _end(self, mine: dict[int, Running], attempt: int) -> None:
        mine.pop(attempt, None)
        self.admitted.pop(attempt, None)
