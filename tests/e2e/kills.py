"""Streams that are disturbed by SIGKILL, for all systems alike.

Knows a running system and its processes; judges nothing.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable, Iterable
from typing import Any

from fermata.aio import AsyncClient
from tests.e2e.system import UpSystem, is_running, wait_for
from tests.history import History, Output, check, check_text
from tests.pipeline.house import read, undisturbed

LENGTH = 64
OFFSETS = int(os.environ.get("FERMATA_FAULT_OFFSETS", "8"))

REQUEST: dict[str, Any] = {
    "token_ids": [20, 30, 40, 50],
    "temperature": 1.0,
    "top_p": 1.0,
    "seed": 11,
    "n": 3,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "ignore_eos": True,
    "max_tokens": LENGTH,
}


def seeded_offsets(kind: str) -> list[int]:
    """The same ones in every run."""
    return sorted(random.Random(kind).sample(range(1, LENGTH), min(OFFSETS, LENGTH - 1)))


async def request_with_stop(address: str) -> tuple[dict[str, Any], dict[int, Output]]:
    """The request with a stop string that choice 0 meets late, and its undisturbed run."""
    text = (await undisturbed(address, REQUEST))[0].text
    place = next(place for place in range(len(text) // 2, len(text)) if text.find(text[place : place + 3]) == place)
    options = REQUEST | {"stop": [text[place : place + 3]]}
    return options, await undisturbed(address, options)


async def killed_at(
    system: UpSystem, offset: int, kill: Callable[[str], int], options: dict[str, Any]
) -> tuple[History, str]:
    """Reads the request; at an offset of any choice something is killed."""
    history = History()
    async with AsyncClient(system.address, give_up_after=30.0) as reader:
        stream = reader.stream(**options)
        killed: list[int] = []

        async def watch() -> None:
            while len(stream.token_ids) < offset and not stream.complete:  # noqa: ASYNC110 - the stream tells nobody
                await asyncio.sleep(0)
            killed.append(await asyncio.to_thread(kill, stream.session_id))

        watching = asyncio.create_task(watch())
        await asyncio.wait_for(read(stream, history, "reader"), 60)
        await watching
        wait_for(lambda: not is_running(killed[0]), 5, "the kill")
        return history, stream.generation_id


async def assert_undisturbed(system: UpSystem, kind: str, offsets: Iterable[int]) -> None:
    """A process of a kind is killed at each of some offsets, and the reader sees the undisturbed run."""
    options, reference = await request_with_stop(system.address)
    for number, offset in enumerate(offsets):
        durability = {"durability": "committed"} if number % 2 else {}
        history, generation = await killed_at(
            system, offset, lambda session_id: KILLS[kind](system, session_id), options | durability
        )
        references = {generation: reference}
        assert check(history, references) + check_text(history, references) == [], f"{kind} killed at offset {offset}"
        await asyncio.to_thread(system.wait_whole)


def kill_owner(system: UpSystem, session_id: str) -> int:
    pid = system.owner_pid(session_id)
    os.kill(pid, signal.SIGKILL)
    return pid


KILLS: dict[str, Callable[[UpSystem, str], int]] = {
    "orchestrator": kill_owner,
    "tokenizer": lambda system, session_id: system.kill("tokenizer", 0),
    "shard": lambda system, session_id: system.kill("shard", 0),
}
