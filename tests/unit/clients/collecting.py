"""Reads streams with either client and judges what came. Shared by the tests of streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeAlias

from fermata import AsyncClient, Client, Finished, Started, Tokens
from fermata.events import Event
from fermata.stream import StreamState
from tests.unit.clients.fake_server import GENERATION_ID, Log

TEXT = "the quick brown fox jumps over the lazy dog and goes home"
WORDS = len(TEXT.split())


class Reading(NamedTuple):
    events: list[Event]
    stream: StreamState

    @property
    def token_ids(self) -> list[int]:
        return [token_id for event in self.events if isinstance(event, Tokens) for token_id in event.token_ids]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)


Read: TypeAlias = Callable[..., Awaitable[Reading]]


async def read_async(
    server: str,
    *,
    give_up_after: float = 10.0,
    resume: bool = False,
    timeout: float | None = None,  # noqa: ASYNC109 - what is under test
    **options: Any,
) -> Reading:
    async with AsyncClient(server, give_up_after=give_up_after) as client:
        if resume:
            stream = client.resume(GENERATION_ID, timeout=timeout, **options)
        else:
            stream = client.stream("a prompt", timeout=timeout, **options)
        return Reading([event async for event in stream], stream)


def read_sync(
    server: str, *, give_up_after: float = 10.0, resume: bool = False, timeout: float | None = None, **options: Any
) -> Reading:
    with Client(server, give_up_after=give_up_after) as client:
        if resume:
            stream = client.resume(GENERATION_ID, timeout=timeout, **options)
        else:
            stream = client.stream("a prompt", timeout=timeout, **options)
        return Reading(list(stream), stream)


def check_whole(reading: Reading, log: Log) -> None:
    """Every token once, in order, one start, one end per choice (P1, P7)."""
    for choice, text in enumerate(log.texts):
        own = [event for event in reading.events if not isinstance(event, Started) and event.choice == choice]
        tokens = [event for event in own if isinstance(event, Tokens)]
        assert [token_id for event in tokens for token_id in event.token_ids] == log.token_ids(choice)
        assert "".join(event.text for event in own) == text
        assert isinstance(own[-1], Finished)
        assert sum(isinstance(event, Finished) for event in own) == 1
    assert isinstance(reading.events[0], Started)
    assert sum(isinstance(event, Started) for event in reading.events) == 1


async def read_all(stream: Any) -> list[Event]:
    return [event async for event in stream]


async def until(condition: Callable[[], bool], seconds: float = 2.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        await asyncio.sleep(0.01)
