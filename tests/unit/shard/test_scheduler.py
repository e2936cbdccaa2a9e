"""Scheduler: everybody gets the tokens he would get alone, whatever the others do."""

from __future__ import annotations

import pytest

from services.common.errors import InvalidLogits
from services.shard.blocks import BlockPool
from services.shard.outcome import Admitted, Tokens
from services.shard.scheduler import Scheduler
from tests.unit.shard.fakes import SIZE, FakeRunner, admission, alone, finish, make, prompt, step

# Budgets and batches.


def test_a_pool_too_small_for_a_context_and_an_empty_budget_are_refused() -> None:
    pool = BlockPool(2, SIZE)
    Scheduler(pool, step_tokens=1, step_sequences=1, context_length=8)
    for step_tokens, step_sequences, context_length in ((1, 1, 9), (0, 1, 8), (1, 0, 8)):
        with pytest.raises(ValueError, match="nothing can run: 2 blocks"):
            Scheduler(pool, step_tokens=step_tokens, step_sequences=step_sequences, context_length=context_length)


def test_nothing_to_do() -> None:
    scheduler, _ = make()
    assert not scheduler.has_work
    assert scheduler.next().chunks == []


def test_a_prompt_is_computed_in_chunks_and_drawn_from_at_its_end() -> None:
    scheduler, runner = make(step_tokens=5)
    scheduler.admit(admission(prompt(12), max_count=2))
    drawn = finish(scheduler, runner)
    chunks = [batch.chunks[0] for batch in runner.batches]
    assert [(chunk.start, len(chunk.token_ids), chunk.draws) for chunk in chunks] == [
        (0, 5, False),
        (5, 5, False),
        (10, 2, True),
        (12, 1, True),
    ]
    assert drawn[1, 1] == alone(prompt(12), 2)


def test_newcomers_join_the_batch_of_those_that_run() -> None:
    scheduler, runner = make()
    scheduler.admit(admission(prompt(3), attempt=1))
    step(scheduler, runner)
    scheduler.admit(admission(prompt(5, 7), attempt=2))
    batch, outcome = step(scheduler, runner)
    assert [len(chunk.token_ids) for chunk in batch.chunks] == [1, 5]
    assert outcome.tokens[1].attempts == [1, 2]
    assert outcome.tokens[1].counts == [2, 1]


def test_a_long_prompt_does_not_stop_those_behind_it() -> None:
    scheduler, runner = make(step_tokens=8)
    scheduler.admit(admission(prompt(3), attempt=2))
    step(scheduler, runner)
    scheduler.admit(admission(prompt(30, 5), attempt=3, priority=1))
    batch, outcome = step(scheduler, runner)
    batch, outcome = step(scheduler, runner)  # the long one comes first now
    assert [len(chunk.token_ids) for chunk in batch.chunks] == [1, 7]
    assert outcome.tokens[1].attempts == [2]


def test_a_step_has_at_most_so_many_sequences() -> None:
    scheduler, runner = make(step_sequences=2)
    for attempt in (1, 2, 3):
        scheduler.admit(admission(prompt(3, attempt), attempt=attempt, max_count=4))
    batch, _ = step(scheduler, runner)
    assert len(batch.chunks) == 2
    assert (scheduler.load.running, scheduler.load.waiting) == (2, 1)
    assert {each: len(tokens) for each, tokens in finish(scheduler, runner).items()} == {
        (1, 1): 3,
        (1, 2): 3,
        (1, 3): 4,
    }


def test_the_waiting_come_by_priority_and_then_by_arrival() -> None:
    scheduler, runner = make(step_sequences=1)
    for attempt, priority in ((1, 0), (2, 5), (3, 5), (4, -1)):
        scheduler.admit(admission(prompt(2), attempt=attempt, priority=priority, max_count=1))
    order = [step(scheduler, runner)[1].tokens[1].attempts[0] for _ in range(4)]
    assert order == [2, 3, 1, 4]


def test_results_are_sorted_by_link() -> None:
    scheduler, runner = make()
    scheduler.admit(admission(prompt(3), link=1, attempt=1))
    scheduler.admit(admission(prompt(3, 9), link=2, attempt=1))
    _, outcome = step(scheduler, runner)
    assert outcome.tokens[1].token_ids == alone(prompt(3), 1)
    assert outcome.tokens[2].token_ids == alone(prompt(3, 9), 1)
    assert outcome.admitted == [Admitted(1, 1, 0), Admitted(2, 1, 0)]


# Ends.


def test_the_token_that_stops_is_reported_and_the_sequence_is_gone() -> None:
    tokens = alone(prompt(5), 8)
    scheduler, runner = make()
    scheduler.admit(admission(prompt(5), stops=[tokens[2]]))
    assert finish(scheduler, runner)[1, 1] == tokens[: tokens.index(tokens[2]) + 1]
    assert (scheduler.load.running, scheduler.load.waiting, scheduler.load.free_blocks) == (0, 0, 16)


def test_max_count_counts_outputs_that_were_known_at_admission() -> None:
    tokens = alone(prompt(5), 6)
    scheduler, runner = make()
    scheduler.admit(admission(prompt(5), outputs=tokens[:4], max_count=6))
    batch, outcome = step(scheduler, runner)
    assert len(batch.chunks[0].token_ids) == 9
    assert outcome.tokens[1].counts == [5]
    assert [*tokens[:4], *outcome.tokens[1].token_ids, *finish(scheduler, runner)[1, 1]] == tokens


def test_a_full_context_ends_a_sequence() -> None:
    scheduler, runner = make(blocks=3, context=11)
    scheduler.admit(admission(prompt(6), max_count=100))
    assert finish(scheduler, runner)[1, 1] == alone(prompt(6), 5)
    assert not scheduler.load.running


def test_invalid_logits_end_that_sequence_alone() -> None:
    scheduler, runner = make(step_tokens=8, poison=31)
    scheduler.admit(admission([*prompt(8), 31], attempt=1))
    scheduler.admit(admission(prompt(5, 20), attempt=2))
    step(scheduler, runner)  # fills two blocks of the first one
    _, outcome = step(scheduler, runner)
    assert [(each.attempt, type(each.error)) for each in outcome.ended] == [(1, InvalidLogits)]
    assert outcome.tokens[1].attempts == [2]
    assert finish(scheduler, runner)[1, 2] == alone(prompt(5, 20), 8)[1:]
    # What a failed sequence computed is not found again.
    scheduler.admit(admission([*prompt(8), 30], attempt=3))
    assert step(scheduler, runner)[1].admitted == [Admitted(1, 3, 0)]


# Grants (R11).


def test_a_sequence_runs_to_its_grant_and_waits_with_its_blocks() -> None:
    scheduler, runner = make()
    scheduler.admit(admission(prompt(5), max_count=8, grant=3))
    assert len(finish(scheduler, runner)[1, 1]) == 3
    assert (scheduler.load.running, scheduler.load.free_blocks) == (1, 14)
    scheduler.grant(1, 1, 2)  # absolute: this is not two more, and takes nothing back
    assert not scheduler.has_work
    scheduler.grant(1, 1, 6)
    assert finish(scheduler, runner)[1, 1] == alone(prompt(5), 6)[3:]
    assert sum(len(chunk.token_ids) for batch in runner.batches for chunk in batch.chunks) == 5 + 5


def test_a_grant_of_nothing_computes_nothing() -> None:
    scheduler, _ = make()
    scheduler.admit(admission(prompt(5), grant=0))
    assert not scheduler.has_work
    scheduler.grant(1, 1, 1)
    assert scheduler.has_work


def test_commands_for_somebody_who_has_just_ended_change_nothing() -> None:
    scheduler, _ = make()
    scheduler.grant(1, 7, 100)
    scheduler.release(1, 7)
    scheduler.release_link(9)
    scheduler.check_integrity()
    assert not scheduler.has_work


# Blocks run out.


@pytest.mark.parametrize(("priority", "order"), [(0, [1, 2]), (-1, [2, 1])])
def test_the_last_in_order_loses_its_blocks_and_is_computed_again(priority: int, order: list[int]) -> None:
    scheduler, runner = make(blocks=5)
    scheduler.admit(admission(prompt(6, 1), attempt=1, max_count=12, priority=priority))
    scheduler.admit(admission(prompt(6, 2), attempt=2, max_count=12))
    drawn: dict[int, list[int]] = {1: [], 2: []}
    finished = []
    while scheduler.has_work:
        for attempt, token_id, count in _tokens(scheduler, runner):
            drawn[attempt].append(token_id)
            if count == 12:
                finished.append(attempt)
    assert scheduler.load.preemptions > 0
    assert finished == order
    assert drawn == {attempt: alone(prompt(6, attempt), 12) for attempt in (1, 2)}


def _tokens(scheduler: Scheduler, runner: FakeRunner) -> list[tuple[int, int, int]]:
    tokens = step(scheduler, runner)[1].tokens.get(1, Tokens())
    return list(zip(tokens.attempts, tokens.token_ids, tokens.counts, strict=True))


def test_those_who_wait_for_a_grant_lose_their_blocks_first() -> None:
    scheduler, runner = make(blocks=5)
    scheduler.admit(admission(prompt(6, 1), attempt=1, max_count=12, grant=2, priority=9))
    scheduler.admit(admission(prompt(6, 2), attempt=2, max_count=12))
    assert len(finish(scheduler, runner)[1, 2]) == 12
    assert (scheduler.load.preemptions, scheduler.load.waiting) == (1, 1)
    scheduler.grant(1, 1, 12)
    assert finish(scheduler, runner)[1, 1] == alone(prompt(6, 1), 12)[2:]


def test_idle_sequences_do_not_keep_others_out_for_ever() -> None:
    scheduler, runner = make(blocks=3)
    scheduler.admit(admission(prompt(7, 1), attempt=1, grant=1, max_count=4))
    finish(scheduler, runner)
    scheduler.admit(admission(prompt(8, 2), attempt=2, max_count=3))
    assert finish(scheduler, runner)[1, 2] == alone(prompt(8, 2), 3)
    assert scheduler.load.preemptions == 1


def test_idle_sequences_keep_their_blocks_while_somebody_runs() -> None:
    scheduler, runner = make(blocks=5)
    scheduler.admit(admission(prompt(7, 1), attempt=1, grant=1, max_count=4))
    scheduler.admit(admission(prompt(3, 2), attempt=2, max_count=4))
    step(scheduler, runner)
    scheduler.admit(admission(prompt(10, 3), attempt=3, max_count=1))
    step(scheduler, runner)
    assert (scheduler.load.preemptions, scheduler.load.waiting) == (0, 1)


def test_nobody_is_let_in_who_would_be_the_next_victim() -> None:
    scheduler, runner = make(blocks=4)
    scheduler.admit(admission(prompt(7, 1), attempt=1, max_count=8))
    step(scheduler, runner)
    scheduler.admit(admission(prompt(7, 2), attempt=2, max_count=8))  # two blocks are there, and one may be needed
    step(scheduler, runner)
    assert scheduler.load.waiting == 1
    finish(scheduler, runner)
    assert scheduler.load.preemptions == 0


def test_nobody_is_let_in_by_the_step_in_which_somebody_lost_his_blocks() -> None:
    scheduler, runner = make(blocks=8, step_tokens=32)
    scheduler.admit(admission(prompt(15, 1), attempt=1, max_count=9))
    scheduler.admit(admission(prompt(11, 2), attempt=2, max_count=9))
    step(scheduler, runner)
    scheduler.admit(admission(prompt(3, 3), attempt=3, max_count=9, priority=1))
    while not scheduler.load.preemptions:
        _, outcome = step(scheduler, runner)
        assert outcome.admitted == []
    assert step(scheduler, runner)[1].admitted == [Admitted(1, 3, 0)]


def test_newcomers_of_one_step_leave_room_for_each_other() -> None:
    scheduler, runner = make(blocks=4)
    for attempt in (1, 2):
        scheduler.admit(admission(prompt(7, attempt), attempt=attempt, max_count=8))
    step(scheduler, runner)
    assert (scheduler.load.running, scheduler.load.waiting) == (1, 1)


def test_the_load_counts_what_was_done() -> None:
    scheduler, runner = make(step_tokens=8)
    scheduler.admit(admission(prompt(10), attempt=1, max_count=3))
    finish(scheduler, runner)
    assert scheduler.load._asdict() == {
        "running": 0,
        "waiting": 0,
        "free_blocks": 16,
        "steps": 4,
        "drawn_tokens": 3,
        "drawing_steps": 3,
        "computed_tokens": 12,
        "cached_tokens": 0,
        "preemptions": 0,
    }
