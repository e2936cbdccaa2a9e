"""Pacer: running sequences wait a bounded time for prompts, prompts go on, whatever the machine does."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from services.shard.pacing import MINIMAL_CHUNK, Pacer

STEP_TOKENS = 512


def decode(running: int) -> float:
    return 0.004 + 0.001 * running


def token(position: float) -> float:
    return 0.0002 + 0.0000004 * position


@dataclass
class Machine:
    """Computes steps in made-up time."""

    pacer: Pacer
    slowness: Callable[[], float] = lambda: 1.0
    seconds: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def step(self, running: int, *, wanted: int = 0, start: int = 0, prompts: int = 1) -> int:
        """A step with a prompt that wants so many tokens; returns how many it gets."""
        allowance = self.pacer.allow(running, prompts if wanted else 0)
        size = allowance.size(min(wanted, STEP_TOKENS), start) if wanted else 0
        if size:
            allowance.spend(size, start)
        seconds = (decode(running) if running else 0.001) + size * token(start + size / 2)
        self.seconds.append(seconds * self.slowness())
        self.sizes.append(size)
        self.pacer.learn(allowance, self.seconds[-1])
        return size

    def prompt(self, length: int, running: int, prompts: int = 1) -> None:
        """Computes a whole prompt beside running sequences."""
        self.seconds.clear()
        self.sizes.clear()
        start = 0
        while start < length:
            start += self.step(running, wanted=length - start, start=start, prompts=prompts)


def warm(budget: float = 0.05, running: int = 16) -> Machine:
    machine = Machine(Pacer(budget))
    for _ in range(20):
        machine.step(running)
    machine.prompt(1000, running)
    return machine


def test_nobody_runs_so_nobody_waits() -> None:
    machine = warm()
    assert machine.step(0, wanted=400) == 400


def test_without_a_budget_there_is_no_limit() -> None:
    assert Machine(Pacer(0.0)).step(16, wanted=400) == 400


def test_at_first_it_looks_and_then_dares_a_minimal_chunk() -> None:
    machine = Machine(Pacer(0.05))
    assert [machine.step(16, wanted=400) for _ in range(2)] == [0, MINIMAL_CHUNK]
    assert machine.step(16, wanted=400) > MINIMAL_CHUNK


def test_a_short_prompt_where_nobody_runs_tells_nothing_of_tokens() -> None:
    machine = Machine(Pacer(0.05))
    machine.step(0, wanted=3)
    assert [machine.step(16, wanted=400) for _ in range(5)] == [0, MINIMAL_CHUNK, 32, 64, 80]


def test_it_dares_twice_what_it_did_of_late() -> None:
    machine = Machine(Pacer(10.0))
    assert [machine.step(16, wanted=400, prompts=1000) for _ in range(6)] == [0, 16, 32, 64, 128, 256]
    machine.prompt(20, 16)
    assert machine.step(16, wanted=512, prompts=1000) > 400, "a short prompt does not change that"


@pytest.mark.parametrize("running", [1, 4, 16, 40])
def test_a_prompt_takes_as_long_as_those_who_run_beside_it(running: int) -> None:
    machine = warm(running=running)
    machine.prompt(2000, running)
    minimal = MINIMAL_CHUNK * token(2000)
    assert max(machine.seconds) <= 2 * decode(running) + minimal
    room = [size for size in machine.sizes[:-1] if size > MINIMAL_CHUNK]
    assert all(size % MINIMAL_CHUNK == 0 for size in machine.sizes[:-1]), "whole query tiles"
    if running >= 16:  # beside few there is only time for minimal chunks
        assert len(room) > 10
        assert sum(machine.seconds) < 3.5 * 2000 * token(1000), "half of the machine, less what whole tiles leave"


def test_no_step_takes_longer_than_its_budget_a_minimal_chunk_and_the_step_alone() -> None:
    budget, running = 0.01, 40
    machine = warm(budget, running)
    for prompts in (1, 8, 1000):
        machine.prompt(2000, running, prompts)
        assert max(machine.seconds) <= decode(running) + budget + MINIMAL_CHUNK * token(2000)
        assert min(machine.sizes[:-1]) in (0, MINIMAL_CHUNK)


def test_prompts_that_outnumber_the_running_get_more_time() -> None:
    machine = warm(running=4)
    few = machine.step(4, wanted=400, prompts=4)
    many = max(machine.step(4, wanted=400, prompts=16) for _ in range(4))
    assert decode(4) * 3 < many * token(many / 2) <= decode(4) * 4.2 and many > 2 * few


def test_tokens_that_read_more_are_expected_to_take_longer() -> None:
    machine = warm()
    assert machine.step(16, wanted=400, start=0) > machine.step(16, wanted=400, start=900)


def test_several_prompts_share_one_step() -> None:
    machine = warm()
    allowance = machine.pacer.allow(16, 3)
    sizes = []
    for _ in range(3):
        sizes.append(allowance.size(48, 0))
        allowance.spend(sizes[-1], 0)
    assert sizes[0] == 48 and sum(sizes) < 3 * 48
    assert sum(sizes) * token(24) <= decode(16) + token(24)


def test_a_minimal_chunk_goes_on_once_per_step_where_there_is_no_time_at_all() -> None:
    machine = warm(budget=1e-9)
    allowance = machine.pacer.allow(16, 3)
    assert allowance.size(10, 0) == 10
    allowance.spend(10, 0)
    assert allowance.size(10, 0) == 6
    allowance.spend(6, 0)
    assert allowance.size(10, 0) == 0


def test_it_looks_again_when_more_or_fewer_run_and_after_a_while_and_never_twice_in_a_row() -> None:
    machine = warm()
    assert machine.step(17, wanted=64) > 0
    assert [machine.step(running, wanted=64) > 0 for running in (30, 30, 8, 8, 8)] == [False, True, False, True, True]
    looks = [machine.step(8, wanted=64) == 0 for _ in range(200)]
    assert sum(looks) == 3 and not any(first and second for first, second in pairwise(looks))


def test_prompts_go_on_when_nobody_says_how_long_steps_take() -> None:
    pacer, sizes = Pacer(0.05), []
    for _ in range(6):
        allowance = pacer.allow(16, 1)
        sizes.append(allowance.size(100, 0))
        allowance.spend(sizes[-1], 0)
        pacer.learn(allowance, 0.0)
    assert sizes == [0, MINIMAL_CHUNK] * 3


def test_a_stall_is_not_taken_for_the_machine() -> None:
    machine = warm()
    before = machine.step(16, wanted=400)
    for slowness in (30.0, 1.0, 1.0, 1.0, 1.0):
        machine.slowness = lambda slowness=slowness: slowness  # type: ignore[misc]
        after = machine.step(16, wanted=400)
    assert after >= before / 2


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    machine = warm(budget=0.02)
    before = machine.step(16, wanted=400)
    machine.slowness = lambda: 5.0
    for _ in range(40):
        machine.step(16)
        after = machine.step(16, wanted=400)
    assert MINIMAL_CHUNK <= after <= before / 3


@pytest.mark.parametrize("seed", range(5))
def test_noise_leaves_the_share_of_the_prompts_about_as_it_is(seed: int) -> None:
    draw = random.Random(seed)
    machine = warm()
    machine.slowness = lambda: draw.uniform(0.9, 1.4) * (5 if draw.random() < 0.02 else 1)
    for _ in range(3):
        machine.prompt(2000, 16)
    time_alone = sum(decode(16) for _ in machine.sizes) * 1.2
    assert 0.4 < (sum(machine.seconds) - time_alone) / time_alone < 1.6


def test_the_same_times_give_the_same_steps() -> None:
    first, second = warm(), warm()
    first.prompt(700, 16)
    second.prompt(700, 16)
    assert first.sizes == second.sizes and len(set(first.sizes)) > 1
