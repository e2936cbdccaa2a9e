"""What waits to be sent on one link, packed: one message per step whatever the batch; a slow link gets several in one.

Nothing here waits for the other end, so a link that does not read never holds up the engine. What can pile up is
bounded by the grants (R11). Used on the event loop only.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

from services.common import rpc
from services.common.errors import FermataError
from services.shard.engine import Report, Timings
from services.shard.outcome import Tokens
from services.shard.v1 import shard_pb2

HEARTBEAT = 1.0
"""Seconds of silence after which a message is sent all the same (R7)."""

STEPS_PER_MESSAGE = 256
"""Keeps messages of a link that stood still for long far below the limit of gRPC."""


class Outbox:
    """The results for one link.

    Args:
        link: its number.
        load: asked when the load is due, which is each second.
        heartbeat: seconds of silence until a heartbeat.
    """

    def __init__(self, link: int, load: Callable[[], shard_pb2.Load], *, heartbeat: float = HEARTBEAT) -> None:
        self.link = link
        self._load, self._heartbeat = load, heartbeat
        self._pending: deque[shard_pb2.LinkResponse] = deque()
        self._arrivals: dict[int, int] = {}
        self._ready = asyncio.Event()
        self._closed = self._draining = False

    def expect(self, attempt: int) -> None:
        """An admission has arrived."""
        self._arrivals[attempt] = time.monotonic_ns()

    def add_admitted(self, attempt: int, cached_tokens: int, started_ns: int) -> None:
        """An admission got its blocks in a step that began at `started_ns`."""
        arrived_ns = self._arrivals.pop(attempt, started_ns)
        self._message().admitted.add(
            attempt=attempt, cached_tokens=cached_tokens, arrived_ns=arrived_ns, started_ns=started_ns
        )

    def add_ended(self, attempt: int, error: FermataError) -> None:
        """An admission ended by itself."""
        self._arrivals.pop(attempt, None)
        self._message().ended.add(attempt=attempt, status=rpc.to_status(error))

    def add_step(self, number: int, tokens: Tokens, timings: Timings) -> None:
        """A step drew tokens for this link."""
        step = self._message().steps.add(
            number=number,
            attempts=tokens.attempts,
            token_ids=tokens.token_ids,
            counts=tokens.counts,
            started_ns=timings.started,
            schedule_ns=timings.schedule,
            forward_ns=timings.forward,
            sample_ns=timings.sample,
            departed_ns=timings.departed,
        )
        if not all(map(math.isnan, tokens.logprobs)):
            step.logprobs.extend(tokens.logprobs)
        if any(tokens.top):
            step.top_counts.extend(map(len, tokens.top))
            step.top_token_ids.extend(token_id for entries in tokens.top for token_id, _ in entries)
            step.top_logprobs.extend(logprob for entries in tokens.top for _, logprob in entries)

    def drain(self) -> None:
        """From now on each message says that the shard is about to leave; the first one goes out at once."""
        self._draining = True
        self._message()

    def close(self) -> None:
        """Ends `messages` when what waits is sent."""
        self._closed = True
        self._ready.set()

    async def messages(self) -> AsyncIterator[shard_pb2.LinkResponse]:
        """What is to be sent, until `close`: results as they come, a heartbeat after silence, the load each second."""
        now = asyncio.get_running_loop().time
        load_due = now()
        self._message()  # greets with the load, so that placement knows it from the start
        while await self._next(now() + self._heartbeat):
            silence = not self._pending
            message = shard_pb2.LinkResponse() if silence else self._pending.popleft()
            if silence or now() >= load_due:
                message.load.CopyFrom(self._load())
                load_due = now() + self._heartbeat
            message.draining = self._draining
            message.departed_ns = time.monotonic_ns()
            yield message

    async def _next(self, deadline: float) -> bool:
        """Waits for something to send or the deadline. Returns False when everything is sent and the box is closed."""
        if not self._pending:
            if self._closed:
                return False
            self._ready.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._ready.wait()
            except TimeoutError:
                return True
        return bool(self._pending) or not self._closed

    def _message(self) -> shard_pb2.LinkResponse:
        """The message that takes what comes next."""
        if not self._pending or len(self._pending[-1].steps) >= STEPS_PER_MESSAGE:
            self._pending.append(shard_pb2.LinkResponse())
        self._ready.set()
        return self._pending[-1]


def load_message(report: Report) -> shard_pb2.Load:
    """The load that a report tells."""
    return shard_pb2.Load(engine_cpu_ns=report.engine_cpu_ns, **report.load._asdict())
