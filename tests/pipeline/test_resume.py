"""B4: whatever is dropped before whichever offset, the reader sees the undisturbed run (P1-P4, P7).

Each case drops one server of the real line, without grace, at an exact token of a 64-token stream, and holds what the
client library delivered against the run in which nothing happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fermata.aio import AsyncClient
from services.common import failpoints
from tests.history import History, Output, Record, Violation, check, check_text
from tests.pipeline.house import House, read, undisturbed

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(480)]

LENGTH = 64
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": LENGTH}
RICH: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": 11,
    "n": 3,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "ignore_eos": True,
    "max_tokens": LENGTH,
}
COMMITTED = {"durability": "committed"}

KINDS: dict[str, tuple[str, Callable[[House], Callable[[], Any]]]] = {
    "orchestrator": ("orchestrator.step", lambda house: house.drop_owner),
    "shard": ("shard.step.before_publish", lambda house: lambda: replace_shard(house)),
    "tokenizer": ("tokenizer.event.before_write", lambda house: lambda: house.drop_tokenizer(0)),
}


async def replace_shard(house: House) -> None:
    await house.drop_shard()
    await house.start_shard()


async def with_stop_string(house: House, options: dict[str, Any]) -> dict[str, Any]:
    """Adds a stop string that choice 0 meets late: two characters of its own text, from somewhere in its middle."""
    reference = await undisturbed(house.address, options)
    text = reference[0].text
    places = [place for place in range(len(text) // 2, len(text) - 2) if text.find(text[place : place + 3]) == place]
    return options | {"stop": [text[places[0] : places[0] + 3]]}


async def disturbed(
    house: House, options: dict[str, Any], reference: dict[int, Output], arrange: Callable[[], None]
) -> list[Violation]:
    """Runs the request while something is dropped, and returns what was wrong with what came."""
    history = History()
    async with AsyncClient(house.address, give_up_after=20.0) as client:
        arrange()
        stream = client.stream(**options)
        await asyncio.wait_for(read(stream, history, "reader"), 30)
        references = {stream.generation_id: reference}
    return check(history, references) + check_text(history, references)


@pytest.mark.parametrize("kind", KINDS)
async def test_before_every_offset(house: House, kind: str) -> None:
    failpoint, dropper = KINDS[kind]
    options = await with_stop_string(house, RICH | {"token_ids": [20, 30, 40, 50]})
    reference = await undisturbed(house.address, options)
    assert max(len(output.token_ids) for output in reference.values()) == LENGTH
    assert reference[0].finish_reason == "STOP_STRING"
    for offset in range(1, LENGTH + 1):
        durability = COMMITTED if offset % 2 else {}
        wrong = await disturbed(
            house,
            options | durability,
            reference,
            lambda offset=offset: house.drop_at(failpoint, offset, dropper(house)),  # type: ignore[misc]
        )
        assert wrong == [], f"{kind} dropped before offset {offset}"
        await house.repair()
        failpoints.configure({}, testing=False)


@pytest.mark.parametrize("kind", KINDS)
async def test_greedy(house: House, kind: str) -> None:
    failpoint, dropper = KINDS[kind]
    options = GREEDY | {"prompt": "Tell me a story."}
    reference = await undisturbed(house.address, options)
    for offset in range(1, LENGTH + 1, 9):
        arrange = lambda offset=offset: house.drop_at(failpoint, offset, dropper(house))  # noqa: E731
        assert await disturbed(house, options, reference, arrange) == [], f"{kind} dropped before offset {offset}"
        await house.repair()
        failpoints.configure({}, testing=False)


async def test_a_killed_client_goes_on_from_every_offset(house: House) -> None:
    options = await with_stop_string(house, RICH | {"token_ids": [20, 30, 40, 50]})
    reference = await undisturbed(house.address, options)
    for offset in range(1, len(reference[0].token_ids)):
        history = History()
        async with AsyncClient(house.address) as first:
            stream = first.stream(**options)
            assert not await read(stream, history, "killed", stop_at=offset)
            stream.leave()
        had = {choice: ids_of(history, choice) for choice in range(3)}
        for choice, ids in had.items():
            history.add(Record("resumed", stream.generation_id, "opened", choice, len(ids)))
        async with AsyncClient(house.address) as second:
            resumed = second.resume(stream.generation_id, token_ids=had)
            assert await asyncio.wait_for(read(resumed, history, "resumed"), 30)
        assert check(history, {stream.generation_id: reference}) == [], f"killed at offset {offset}"
        ended = {record.choice for record in history.records if (record.reader, record.kind) == ("killed", "finished")}
        texts = {choice: text_of(history, choice) for choice in range(3) if choice not in ended}
        assert texts == {choice: reference[choice].text for choice in texts}, f"killed at offset {offset}"


def text_of(history: History, choice: int) -> str:
    return "".join(record.text for record in history.records if record.choice == choice)


def ids_of(history: History, choice: int) -> list[int]:
    return [
        token_id
        for record in history.records
        if record.kind == "tokens" and record.choice == choice
        for token_id in record.token_ids
    ]


async def test_everything_stops_and_starts(house: House) -> None:
    options = RICH | {"token_ids": [9, 8, 7], "n": 2}
    reference = await undisturbed(house.address, options)
    history = History()
    async with AsyncClient(house.address) as client:
        stream = client.stream(**options)
        await read(stream, history, "reader", stop_at=20)
        stream.leave()
    for index in range(2):
        await house.drop_tokenizer(index)
        await house.drop_orchestrator(index)
    await house.drop_shard()
    house.store.kill()
    house.store.restart()
    await house.repair()
    had = {choice: ids_of(history, choice) for choice in range(2)}
    async with AsyncClient(house.address) as client:
        assert await read(client.resume(stream.generation_id, token_ids=had), history, "reader")
        from_the_start = History()
        assert await read(client.resume(stream.generation_id), from_the_start, "another")
    references = {stream.generation_id: reference}
    assert check(history, references) + check_text(history, references) == []
    assert check(from_the_start, references) + check_text(from_the_start, references) == []
