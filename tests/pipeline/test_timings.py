"""R25: where the time of each token went, in the chunk itself; a delay is found in its own part."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from fermata import Tokens, TokenTimings
from fermata.aio import AsyncClient
from services.common import failpoints
from tests.pipeline.house import House

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUEST: dict[str, Any] = {
    "token_ids": [20, 30, 40, 50],
    "seed": 5,
    "ignore_eos": True,
    "max_tokens": 40,
    "timings": True,
}
MILLISECOND = 1_000_000
DELAY = 0.15


async def timed(house: House, **options: Any) -> tuple[dict[int, list[TokenTimings]], dict[int, list[int]]]:
    """Timings of all tokens and the moments of their arrival, by choice."""
    timings: dict[int, list[TokenTimings]] = {}
    arrivals: dict[int, list[int]] = {}
    async with AsyncClient(house.address) as client, client.stream(**REQUEST | options) as stream:
        async for event in stream:
            if isinstance(event, Tokens):
                assert len(event.timings) == len(event.token_ids)
                timings.setdefault(event.choice, []).extend(event.timings)
                arrivals.setdefault(event.choice, []).extend([time.monotonic_ns()] * len(event.token_ids))
    return timings, arrivals


@pytest.mark.parametrize("durability", ["async", "committed"])
async def test_every_token_of_every_choice_is_accounted_for(house: House, durability: str) -> None:
    timings, arrivals = await timed(house, n=3, durability=durability)
    assert [len(items) for items in timings.values()] == [40, 40, 40]
    for choice, items in timings.items():
        for offset in range(1, 40):
            seen = arrivals[choice][offset] - arrivals[choice][offset - 1]
            assert abs(items[offset].total_ns - seen) < 2 * MILLISECOND
            assert items[offset].unaccounted_ns == 0
        assert items[0].unaccounted_ns == 0
        assert items[0].total_ns > sum(map(abs, (items[0].claim_ns, items[0].forward_ns)))
        assert min(items[0].open_ns, items[0].encode_ns, items[0].claim_ns, items[0].place_ns) > 0
        assert items[0].admission_ns > 0
        assert items[0].render_ns == 0
        assert items[1].claim_ns == 0
        assert all(min(item.schedule_ns, item.forward_ns, item.sample_ns) > 0 for item in items)
        assert sum(item.forward_ns for item in items) > MILLISECOND


async def test_who_does_not_ask_gets_none(house: House) -> None:
    async with AsyncClient(house.address) as client, client.stream(**REQUEST | {"timings": False}) as stream:
        async for event in stream:
            assert not isinstance(event, Tokens) or event.timings == ()


def slept() -> None:
    time.sleep(DELAY)


def longest(items: list[TokenTimings], part: str) -> float:
    """What a part took at most, as a share of the delay. Other parts of other tokens may be long, too."""
    return max(int(getattr(item, f"{part}_ns")) for item in items[1:]) / (DELAY * 1e9)


@pytest.mark.parametrize(
    ("point", "part"),
    [
        ("shard.step.before_publish", "publish"),
        ("orchestrator.step", "relay"),
        ("tokenizer.event.before_write", "write"),
    ],
)
async def test_a_delay_is_found_where_it_was(house: House, point: str, part: str) -> None:
    failpoints.on(point, slept, count=20)
    timings, _ = await timed(house)
    assert longest(timings[0], part) > 0.9


async def test_a_slow_store_is_the_commit_of_those_who_wait_for_it(house: House) -> None:
    def freeze() -> None:
        house.store.freeze()
        asyncio.get_running_loop().call_later(DELAY, house.store.thaw)

    failpoints.on("orchestrator.append.before", freeze, count=5)
    timings, _ = await timed(house, durability="committed")
    assert longest(timings[0], "commit") > 0.9


async def test_a_takeover_is_unaccounted_and_nothing_else_is(house: House) -> None:
    house.drop_at("orchestrator.step", 20, house.drop_owner)
    timings, _ = await timed(house)
    assert len(timings[0]) == 40
    unknown = [offset for offset, item in enumerate(timings[0]) if offset and item.unaccounted_ns]
    assert 1 <= len(unknown) <= 8
