"""Scheduler: tenants share what there is, prompts leave time to those who run, and neither changes a token (R23)."""

from __future__ import annotations

import random

import pytest

from services.shard.outcome import Admitted, Tokens
from services.shard.pacing import MINIMAL_CHUNK
from services.shard.scheduler import Batch, Scheduler
from tests.unit.shard.fakes import FakeRunner, admission, alone, finish, greedy, make, prompt, step

# Tenants.


def admitted(scheduler: Scheduler, runner: FakeRunner, steps: int) -> list[int]:
    """The attempts that are let in, in this order."""
    return [each.attempt for _ in range(steps) for each in step(scheduler, runner)[1].admitted]


def test_a_tenant_with_a_thousand_requests_does_not_keep_another_one_waiting() -> None:
    scheduler, runner = make(step_sequences=2)
    for attempt in range(1, 1001):
        scheduler.admit(admission(prompt(3, attempt), attempt=attempt, max_count=4, tenant="a"))
    assert admitted(scheduler, runner, 2) == [1, 2]
    scheduler.admit(admission(prompt(3, 7), attempt=2000, max_count=4, tenant="b"))
    assert admitted(scheduler, runner, 4)[0] == 2000, "as soon as anybody ends"


def test_tenants_that_wait_are_let_in_by_what_they_were_served() -> None:
    scheduler, runner = make(step_sequences=1)
    for attempt in range(1, 5):
        scheduler.admit(admission(prompt(12, attempt), attempt=attempt, max_count=1, tenant="a"))
        scheduler.admit(admission(prompt(3, attempt), attempt=10 + attempt, max_count=1, tenant="b"))
    order = admitted(scheduler, runner, 8)
    assert order == [1, 11, 12, 13, 14, 2, 3, 4]


def test_priority_comes_before_fairness() -> None:
    scheduler, runner = make(step_sequences=1)
    for attempt in (1, 2, 3):
        scheduler.admit(admission(prompt(3, attempt), attempt=attempt, max_count=1, tenant="a", priority=1))
    scheduler.admit(admission(prompt(3, 7), attempt=4, max_count=1, tenant="b"))
    assert admitted(scheduler, runner, 4) == [1, 2, 3, 4]


def test_a_short_prompt_of_another_tenant_overtakes_a_long_one() -> None:
    scheduler, runner = make(step_tokens=8)
    scheduler.admit(admission(prompt(40), attempt=1, max_count=1, tenant="a"))
    step(scheduler, runner)
    scheduler.admit(admission(prompt(30, 3), attempt=2, max_count=1, tenant="a"))
    scheduler.admit(admission(prompt(5, 7), attempt=3, max_count=1, tenant="b"))
    step(scheduler, runner)  # both have been served as much, and the first came first
    batch, outcome = step(scheduler, runner)
    assert [len(chunk.token_ids) for chunk in batch.chunks] == [5, 3]
    assert outcome.tokens[1].attempts == [3]


def test_prompt_tokens_are_shared_between_tenants_and_in_order_within_one() -> None:
    scheduler, runner = make(blocks=64, step_tokens=8)
    for attempt, tenant in enumerate("aab", 1):
        scheduler.admit(admission(prompt(60, attempt), attempt=attempt, max_count=1, tenant=tenant))
    computed = {1: 0, 2: 0, 3: 0}
    for _ in range(12):
        batch, _ = step(scheduler, runner)
        for chunk, name in zip(batch.chunks, batch.generations, strict=True):
            computed[int(name.split(".")[1])] += len(chunk.token_ids)
    assert computed == {1: 48, 2: 0, 3: 48}


def test_two_tenants_do_not_take_blocks_from_each_other_for_ever() -> None:
    """Whoever got his first blocks earlier keeps them, whatever his tenant has been served since."""
    scheduler, runner = make(blocks=6, step_tokens=6)
    for attempt in range(1, 9):
        scheduler.admit(admission(prompt(5, attempt), attempt=attempt, max_count=16, tenant="ab"[attempt % 2]))
    before = scheduler.load
    drawn: dict[int, list[int]] = {attempt: [] for attempt in range(1, 9)}
    while scheduler.has_work:
        tokens = step(scheduler, runner)[1].tokens.get(1, Tokens())
        for attempt, token_id in zip(tokens.attempts, tokens.token_ids, strict=True):
            drawn[attempt].append(token_id)
        load = scheduler.load
        if load.preemptions > before.preemptions:
            assert load.running < before.running, "nobody is let in at once for somebody who has just lost his blocks"
        before = load
    assert 0 < before.preemptions < 20
    assert drawn == {attempt: alone(prompt(5, attempt), 16) for attempt in range(1, 9)}


def test_a_prompt_that_has_blocks_goes_on_though_those_who_run_fill_the_step() -> None:
    scheduler, runner = make(step_sequences=2, step_tokens=4)
    scheduler.admit(admission(prompt(3), attempt=1, grant=1, max_count=20))
    finish(scheduler, runner)
    scheduler.admit(admission(prompt(3, 5), attempt=2, max_count=20))
    scheduler.admit(admission(prompt(9, 7), attempt=3, max_count=1))
    step(scheduler, runner)
    scheduler.grant(1, 1, 20)
    outcomes = [step(scheduler, runner)[1] for _ in range(4)]
    assert [outcome.tokens[1].attempts for outcome in outcomes] == [[1], [1], [1, 3], [1, 2]]


# Time.


def timed(batch: Batch) -> float:
    """A machine on which a step takes 10 ms, and a prompt token 0.2 ms."""
    return 0.01 + 0.0002 * sum(len(chunk.token_ids) for chunk in batch.chunks if len(chunk.token_ids) > 1)


def play(step_time: float, seconds: random.Random | None = None) -> tuple[list[Batch], dict[int, list[int]]]:
    """Two streams, and a long prompt that comes when they run. Returns the batches, and the tokens by attempt."""
    scheduler, runner = make(blocks=128, step_tokens=256, step_time=step_time)
    for attempt in (1, 2):
        scheduler.admit(admission(prompt(5, attempt), attempt=attempt, max_count=60))
    batches: list[Batch] = []
    drawn: dict[int, list[int]] = {1: [], 2: [], 3: []}
    while scheduler.has_work:
        if len(batches) == 10:
            scheduler.admit(admission(prompt(300, 3), attempt=3, max_count=3))
        batches.append(scheduler.next())
        tokens = scheduler.close(
            batches[-1],
            greedy(runner.forward(batches[-1])),
            seconds.lognormvariate(-4, 1) if seconds else timed(batches[-1]),
        ).tokens[1]
        for attempt, token_id in zip(tokens.attempts, tokens.token_ids, strict=True):
            drawn[attempt].append(token_id)
    return batches, drawn


def test_a_long_prompt_takes_at_most_its_time_beside_running_sequences() -> None:
    batches, _ = play(step_time=0.05)
    sizes = [len(batch.chunks[2].token_ids) for batch in batches[10:] if len(batch.chunks) == 3]
    assert sizes == [MINIMAL_CHUNK, 32, 48, 48, 48, 48, 48, 12, 1, 1], "soon ten milliseconds; then two more outputs"
    assert all({1, 2} <= {int(name[2:]) for name in batch.generations} for batch in batches[10:30])


def test_without_a_limit_it_takes_what_the_budget_of_tokens_leaves() -> None:
    batches, _ = play(step_time=0.0)
    assert [len(chunk.token_ids) for chunk in batches[10].chunks] == [1, 1, 254]


@pytest.mark.parametrize("seed", range(3))
def test_tokens_do_not_depend_on_times(seed: int) -> None:
    expected = {1: alone(prompt(5, 1), 60), 2: alone(prompt(5, 2), 60), 3: alone(prompt(300, 3), 3)}
    batches, drawn = play(step_time=0.05, seconds=random.Random(seed))
    assert drawn == expected == play(step_time=0.0)[1]
    again, _ = play(step_time=0.05, seconds=random.Random(seed))
    assert [batch.chunks for batch in batches] == [batch.chunks for batch in again], "equal times give equal steps"


def test_a_lone_prompt_is_not_slowed() -> None:
    scheduler, runner = make(blocks=64, step_tokens=100, step_time=0.001)
    scheduler.admit(admission(prompt(250), max_count=1))
    sizes = [len(step(scheduler, runner, seconds=1.0)[0].chunks[0].token_ids) for _ in range(3)]
    assert sizes == [100, 100, 50]


def test_prompts_go_on_beside_sequences_that_take_all_the_time() -> None:
    scheduler, runner = make(blocks=64, step_tokens=100, step_time=1e-6)
    scheduler.admit(admission(prompt(3), attempt=1, max_count=100))
    step(scheduler, runner, seconds=1.0)
    scheduler.admit(admission(prompt(2 * MINIMAL_CHUNK, 5), attempt=2, max_count=1))
    outcomes = [step(scheduler, runner, seconds=1.0)[1] for _ in range(4)]
    assert [each for outcome in outcomes for each in outcome.admitted] == [Admitted(1, 2, 0)]
    assert any(2 in outcome.tokens[1].attempts for outcome in outcomes)


def test_a_negative_time_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 s for prompts"):
        make(step_time=-1)


# Cancels free blocks at once.


@pytest.mark.parametrize("victim", [1, 2, 3], ids=["leader", "sibling that runs", "sibling that waits"])
def test_a_release_frees_all_but_what_others_share(victim: int) -> None:
    scheduler, runner = make(step_sequences=2, prefix_cache=False)
    for attempt in (1, 2, 3):
        fork_of = 1 if attempt > 1 else None
        scheduler.admit(
            admission(prompt(6), attempt=attempt, generation_id="g", choice=attempt, fork_of=fork_of, max_count=12)
        )
    drawn: dict[int, list[int]] = {1: [], 2: [], 3: []}
    for _ in range(4):
        tokens = step(scheduler, runner)[1].tokens[1]
        for attempt, token_id in zip(tokens.attempts, tokens.token_ids, strict=True):
            drawn[attempt].append(token_id)
    assert (scheduler.load.running, scheduler.load.waiting) == (2, 1)
    held = 16 - scheduler.load.free_blocks
    scheduler.release(1, victim)
    scheduler.check_integrity()
    freed = held - (16 - scheduler.load.free_blocks)
    assert freed == {1: 2, 2: 1, 3: 0}[victim], "its own blocks; the first one is shared"
    assert scheduler.load.running + scheduler.load.waiting == 2
    for (_, attempt), tokens_left in finish(scheduler, runner).items():
        drawn[attempt] += tokens_left
    del drawn[victim]
    assert drawn == dict.fromkeys(drawn, alone(prompt(6), 12))
    assert scheduler.load.free_blocks == 16
