"""Scheduler: what sequences share, and who may own a choice."""

from __future__ import annotations

import pytest

from services.common.errors import InvalidRequest, OwnerChanged
from services.shard.outcome import Admitted
from services.shard.sequence import Admission
from tests.unit.shard.fakes import SIZE, admission, alone, finish, make, prompt, step

# Prefixes.


def test_a_prompt_finds_the_blocks_of_an_equal_one_but_computes_its_last_token() -> None:
    scheduler, runner = make()
    scheduler.admit(admission(prompt(8), attempt=1, max_count=1))
    step(scheduler, runner)
    scheduler.admit(admission(prompt(8), attempt=2, max_count=1))
    batch, outcome = step(scheduler, runner)
    assert outcome.admitted == [Admitted(1, 2, 4)]
    assert batch.chunks[0].start == 4
    assert outcome.tokens[1].token_ids == alone(prompt(8), 1)
    assert scheduler.load.cached_tokens == 4


def test_blocks_can_be_found_as_soon_as_their_step_is_done() -> None:
    scheduler, runner = make(step_tokens=8)
    scheduler.admit(admission(prompt(20), attempt=1))
    step(scheduler, runner)  # 8 of 20 tokens
    scheduler.admit(admission(prompt(20), attempt=2, priority=1))
    _, outcome = step(scheduler, runner)
    assert outcome.admitted == [Admitted(1, 2, 8)], "priority goes before what has begun"
    drawn = finish(scheduler, runner)
    assert drawn[1, 1] == drawn[1, 2] == alone(prompt(20), 8)
    assert scheduler.load.cached_tokens >= 8


def test_outputs_are_found_too() -> None:
    scheduler, runner = make()
    scheduler.admit(admission(prompt(5), attempt=1, max_count=8))
    tokens = finish(scheduler, runner)[1, 1]
    scheduler.admit(admission([*prompt(5), *tokens, 3], attempt=2, max_count=1))
    assert step(scheduler, runner)[1].admitted == [Admitted(1, 2, 12)]


def test_another_tenant_finds_nothing() -> None:
    scheduler, runner = make()
    for attempt, tenant in enumerate("ab", 1):
        scheduler.admit(admission(prompt(9), attempt=attempt, tenant=tenant, max_count=1))
        assert step(scheduler, runner)[1].admitted == [Admitted(1, attempt, 0)]


# Siblings.


@pytest.mark.parametrize("length", [7, 8, 9])
def test_a_sibling_shares_the_prompt_and_computes_its_last_token(length: int) -> None:
    scheduler, runner = make()
    scheduler.admit(admission(prompt(length), attempt=1, generation_id="g", choice=0))
    scheduler.admit(admission(prompt(length), attempt=2, generation_id="g", choice=1, fork_of=1))
    first, outcome = step(scheduler, runner)
    assert len(first.chunks) == 1 and [each.attempt for each in outcome.admitted] == [1]
    second, outcome = step(scheduler, runner)
    assert outcome.admitted == [Admitted(1, 2, length - 1)]
    assert (second.chunks[1].start, len(second.chunks[1].token_ids)) == (length - 1, 1)
    assert len(second.copies) == ((length - 1) % SIZE > 0)
    drawn = finish(scheduler, runner)
    assert drawn[1, 1][-6:] == drawn[1, 2][-6:] == alone(prompt(length), 8)[-6:]


def test_siblings_that_differ_do_not_disturb_each_other() -> None:
    scheduler, runner = make()
    outputs = [[], [3], [4, 5], [6]]
    for choice, known in enumerate(outputs):
        scheduler.admit(
            admission(
                prompt(6),
                attempt=choice + 1,
                generation_id="g",
                choice=choice,
                outputs=known,
                fork_of=1 if choice else None,
            )
        )
    drawn = finish(scheduler, runner)
    for choice, known in enumerate(outputs):
        assert drawn[1, choice + 1] == alone([*prompt(6), *known], 8 - len(known))
    assert sum(len(batch.copies) for batch in runner.batches) == 3


def test_a_sibling_waits_for_a_leader_that_is_computed_in_chunks() -> None:
    scheduler, runner = make(step_tokens=4)
    scheduler.admit(admission(prompt(10), attempt=1, generation_id="g", max_count=1))
    scheduler.admit(admission(prompt(10), attempt=2, generation_id="g", choice=1, fork_of=1, max_count=1))
    assert len(finish(scheduler, runner)) == 2
    assert [len(batch.chunks) for batch in runner.batches] == [1, 1, 1, 1]


def test_a_sibling_goes_alone_when_its_leader_has_gone() -> None:
    scheduler, runner = make(prefix_cache=False)
    scheduler.admit(admission(prompt(10), attempt=1, generation_id="g"))
    scheduler.admit(admission(prompt(10), attempt=2, generation_id="g", choice=1, fork_of=1))
    scheduler.release(1, 1)
    assert step(scheduler, runner)[1].admitted == [Admitted(1, 2, 0)]
    scheduler.admit(admission(prompt(10), attempt=3, generation_id="g", choice=2, fork_of=1))
    assert Admitted(1, 3, 0) in step(scheduler, runner)[1].admitted
    drawn = finish(scheduler, runner)
    assert drawn[1, 3][-5:] == alone(prompt(10), 8)[-5:]


def test_a_sibling_does_not_wait_for_a_leader_that_has_no_grant() -> None:
    scheduler, runner = make()
    scheduler.admit(admission(prompt(10), attempt=1, generation_id="g", grant=0))
    scheduler.admit(admission(prompt(10), attempt=2, generation_id="g", choice=1, fork_of=1))
    assert finish(scheduler, runner)[1, 2] == alone(prompt(10), 8)


def test_a_sibling_of_a_sibling_waits_until_that_one_has_its_copy() -> None:
    scheduler, runner = make(prefix_cache=False)
    scheduler.admit(admission(prompt(6), attempt=1, generation_id="g", grant=1))
    step(scheduler, runner)
    scheduler.admit(admission(prompt(6), attempt=2, generation_id="g", choice=1, outputs=[3, 5], fork_of=1))
    scheduler.admit(admission(prompt(6), attempt=3, generation_id="g", choice=2, outputs=[4], fork_of=2))
    _, outcome = step(scheduler, runner)
    assert outcome.admitted == [Admitted(1, 2, 6)], "copies of one step have no order"
    _, outcome = step(scheduler, runner)
    assert outcome.admitted == [Admitted(1, 3, 6)]
    assert finish(scheduler, runner)[1, 3] == alone([*prompt(6), 4], 7)[1:]


@pytest.mark.parametrize(
    "other", [admission([9, *prompt(5)], attempt=2, fork_of=1), admission(prompt(5), attempt=2, fork_of=1)]
)
def test_a_fork_of_another_prompt_is_refused(other: Admission) -> None:
    scheduler, runner = make()
    scheduler.admit(admission(prompt(6), attempt=1))
    (ended,) = scheduler.admit(other)
    assert (ended.attempt, type(ended.error)) == (2, InvalidRequest)
    assert ended.error.violations[0].field == "fork_of"
    assert finish(scheduler, runner) == {(1, 1): alone(prompt(6), 8)}


def test_a_fork_never_crosses_tenants() -> None:
    scheduler, _ = make()
    scheduler.admit(admission(prompt(6), attempt=1, tenant="a"))
    (ended,) = scheduler.admit(admission(prompt(6), attempt=2, tenant="b", fork_of=1))
    assert isinstance(ended.error, InvalidRequest)


# Owners (R11).


@pytest.mark.parametrize("epoch", [2, 3])
def test_a_newer_admission_of_a_choice_ends_the_older_one_and_takes_its_blocks(epoch: int) -> None:
    scheduler, runner = make()
    scheduler.admit(admission(prompt(9), link=1, attempt=5, generation_id="g", epoch=2))
    step(scheduler, runner)
    tokens = alone(prompt(9), 8)
    (ended,) = scheduler.admit(
        admission(prompt(9), link=2, attempt=1, generation_id="g", epoch=epoch, outputs=tokens[:1])
    )
    assert (ended.link, ended.attempt, type(ended.error)) == (1, 5, OwnerChanged)
    _, outcome = step(scheduler, runner)
    assert outcome.admitted == [Admitted(2, 1, 8)]
    assert [*tokens[:1], *outcome.tokens[2].token_ids, *finish(scheduler, runner)[2, 1]] == tokens


def test_an_admission_with_a_lower_epoch_is_refused() -> None:
    scheduler, runner = make()
    scheduler.admit(admission(prompt(9), link=1, attempt=5, generation_id="g", epoch=2))
    (ended,) = scheduler.admit(admission(prompt(9), link=2, attempt=1, generation_id="g", epoch=1))
    assert (ended.link, ended.attempt, type(ended.error)) == (2, 1, OwnerChanged)
    assert finish(scheduler, runner) == {(1, 5): alone(prompt(9), 8)}


def test_choices_of_a_generation_do_not_replace_each_other() -> None:
    scheduler, _ = make()
    assert scheduler.admit(admission(prompt(9), attempt=1, generation_id="g", choice=0)) == []
    assert scheduler.admit(admission(prompt(9), attempt=2, generation_id="g", choice=1, epoch=7)) == []


def test_an_attempt_in_use_is_refused() -> None:
    scheduler, runner = make()
    scheduler.admit(admission(prompt(9), attempt=1))
    (ended,) = scheduler.admit(admission(prompt(3), attempt=1, generation_id="other"))
    assert isinstance(ended.error, InvalidRequest)
    assert scheduler.admit(admission(prompt(3), link=2, attempt=1)) == []
    assert finish(scheduler, runner) == {(1, 1): alone(prompt(9), 8), (2, 1): alone(prompt(3), 8)}


def test_a_lost_link_ends_all_of_its_sequences_and_leaves_a_prefix_cache() -> None:
    scheduler, runner = make(step_sequences=2)
    for attempt in (1, 2, 3):
        scheduler.admit(admission(prompt(8, attempt), link=1, attempt=attempt))
    scheduler.admit(admission(prompt(4, 20), link=2, attempt=1))
    step(scheduler, runner)
    scheduler.release_link(1)
    scheduler.check_integrity()
    scheduler.admit(admission(prompt(8, 1), link=3, attempt=1))
    assert Admitted(3, 1, 4) in step(scheduler, runner)[1].admitted
    assert set(finish(scheduler, runner)) == {(2, 1), (3, 1)}
