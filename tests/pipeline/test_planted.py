"""The checker is worth something: each planted bug makes it speak, where the right code keeps it silent.

Each scenario is run twice, without and with its bug.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from fermata.aio import AsyncClient
from fermata.errors import FermataError
from services.common import failpoints
from services.orchestrator.recovery import Recovery
from services.orchestrator.session_records import Append, Operation, Result, SessionRecord, join_generation_id
from services.orchestrator.sessions import SessionStore
from tests.history import History, Output, Record, Violation, check, check_text
from tests.pipeline.house import House, read, undisturbed

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

REQUEST: dict[str, Any] = {
    "token_ids": [20, 30, 40, 50],
    "temperature": 1.0,
    "top_p": 1.0,
    "seed": 5,
    "ignore_eos": True,
    "max_tokens": 48,
}


class Scenario:
    """A run with a fault that the right code heals."""

    def __init__(self, house: House, options: dict[str, Any], reference: dict[int, Output]) -> None:
        self.house, self.options, self.reference = house, options, reference

    async def read(self, arrange: Callable[[], None] | None = None) -> list[Violation]:
        """Reads the whole stream, with something arranged to happen."""
        history = History()
        stream = None
        async with AsyncClient(self.house.address, give_up_after=3.0) as client:
            if arrange is not None:
                arrange()
            stream = client.stream(**self.options)
            try:
                await asyncio.wait_for(read(stream, history, "reader"), 20)
            except (FermataError, TimeoutError) as error:
                history.add(Record("reader", stream.generation_id, "failed", detail=repr(error)))
        references = {stream.generation_id: self.reference}
        return check(history, references) + check_text(history, references)


async def undisturbed_run(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> list[Violation]:
    return await scenario.read()


async def owner_dropped(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> list[Violation]:
    house = scenario.house
    return await scenario.read(lambda: house.drop_at("orchestrator.step", 24, house.drop_owner))


async def two_owners(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> list[Violation]:
    """The other orchestrator takes the living owner for dead, as after a long pause, and claims its generation."""
    house, history = scenario.house, History()

    async def nobody_lives(self: Recovery, session: SessionRecord) -> bool:
        return False

    write = SessionStore.write

    async def noted(self: SessionStore, operations: Sequence[Operation]) -> list[Result]:
        results = await write(self, operations)
        for operation, result in zip(operations, results, strict=True):
            if isinstance(operation, Append) and result.kind == 0:
                name = join_generation_id(operation.session, operation.generation)
                history.add(Record(f"owner {id(self)}", name, "appended", count=operation.epoch))
        return results

    monkeypatch.setattr(SessionStore, "write", noted)
    options = scenario.options | {"max_tokens": 300}
    async with AsyncClient(house.address) as first, AsyncClient(house.address) as second:
        stream = first.stream(**options)
        await read(stream, History(), "first", stop_at=10)
        monkeypatch.setattr(Recovery, "is_owned_elsewhere", nobody_lives)
        owner = next(item for item in house.orchestrators if item is not None and item.service.owner.generations)
        other = next(item for item in house.orchestrators if item is not None and item is not owner)
        name = next(iter(owner.service.owner.generations))
        claimed = await other.service.recovery.find(name)
        history.add(Record(f"owner {id(other.service.store)}", stream.generation_id, "claimed", count=claimed.epoch))
        reading = asyncio.create_task(read(stream, History(), "first"))
        await asyncio.sleep(1.0)
        reading.cancel()
        await asyncio.wait([reading])
        stream.leave()
        await second.cancel(stream.generation_id)
    return check(history)


SCENARIOS: dict[str, Callable[[Scenario, pytest.MonkeyPatch], Awaitable[list[Violation]]]] = {
    "stop_seen_late": undisturbed_run,
    "noise_by_output_offset": undisturbed_run,
    "resume_off_by_one": owner_dropped,
    "resampled_tail": owner_dropped,
    "no_owner_check": two_owners,
}


@pytest.mark.parametrize("bug", SCENARIOS)
async def test_each_planted_bug_is_caught(house: House, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(REQUEST)
    reference = await undisturbed(house.address, options)
    if bug == "stop_seen_late":
        text = reference[0].text
        place = next(i for i in range(len(text) // 2, len(text)) if text.find(text[i : i + 3]) == i)
        options["stop"] = [text[place : place + 3]]
        reference = await undisturbed(house.address, options)
    scenario = Scenario(house, options, reference)
    with monkeypatch.context() as patch:
        assert await SCENARIOS[bug](scenario, patch) == []
    await house.repair()
    failpoints.configure({"FERMATA_PLANT": bug}, testing=True)
    with monkeypatch.context() as patch:
        assert await SCENARIOS[bug](scenario, patch) != []
