"""The ring of steps: who was in which, for how long it is remembered, and each is collected once."""

from __future__ import annotations

from services.common.tracing import step_context
from services.shard.engine import Timings
from services.shard.steps import KEPT_STEPS, StepLog, StepRecord


def record(number: int, **lengths: int) -> StepRecord:
    return StepRecord(number, Timings(1000 * number, 10_000, 20_000, 30_000, 90_000), [*lengths], [*lengths.values()])


def test_the_steps_of_a_generation_with_all_who_were_in_them() -> None:
    log = StepLog("shard")
    log.add(record(1, one=1, other=40))
    log.add(record(2, other=1))
    (step,) = log.spans("one")
    assert step.context == step_context("shard", 1)
    assert (step.attributes["fermata.step.number"], step.attributes["fermata.step.tokens"]) == (1, 41)
    assert step.attributes["fermata.step.generations"] == ["one", "other"]
    assert list(step.attributes["fermata.step.lengths"]) == [1, 40]  # type: ignore[arg-type]
    assert step.attributes["fermata.token.forward_us"] == 20
    assert [item.attributes["fermata.step.number"] for item in log.spans("other")] == [1, 2]


def test_what_a_device_took_is_told_where_there_is_one() -> None:
    log = StepLog("shard")
    log.add(record(1, one=1))
    log.add(record(2, one=1)._replace(timings=Timings(2000, 10_000, 20_000, 30_000, 90_000, device=15_000)))
    without, with_device = log.spans("one")
    assert "fermata.step.device_us" not in without.attributes
    assert with_device.attributes["fermata.step.device_us"] == 15
    assert with_device.attributes["fermata.token.forward_us"] == 20


def test_the_oldest_are_forgotten() -> None:
    log = StepLog("shard")
    for number in range(KEPT_STEPS + 2):
        log.add(record(number, one=1))
    numbers = [item.attributes["fermata.step.number"] for item in log.spans("one")]
    assert numbers == list(range(2, KEPT_STEPS + 2))


def test_a_step_is_collected_once_whoever_was_in_it() -> None:
    log = StepLog("shard")
    log.add(record(1, one=1, other=1))
    log.add(record(2, other=1))
    assert [item.attributes["fermata.step.number"] for item in log.uncollected("one")] == [1]
    assert [item.attributes["fermata.step.number"] for item in log.uncollected("other")] == [2]
    assert list(log.uncollected("one")) == []
