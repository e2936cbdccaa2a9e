"""Engine: commands between steps, one report per step, rest when idle, and a loud end when it cannot go on."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue

import pytest

from services.common import failpoints
from services.common.errors import InvalidLogits, OwnerChanged
from services.common.sampling import Drawn
from services.shard.blocks import BlockPool
from services.shard.engine import FAILED, Commands, Engine, Report
from services.shard.kernels.interface import Logits
from services.shard.outcome import Outcome
from services.shard.scheduler import Batch, Scheduler
from services.shard.sequence import Admission
from tests.unit.shard.fakes import FakeRunner, admission, alone

ROOT = Path(__file__).resolve().parents[3]
BLOCKS, SIZE = 16, 4
PROMPT = [1, 2, 3, 4, 5]


class Running:
    """An engine with its reports."""

    def __init__(self, runner: FakeRunner, scheduler: Scheduler | None = None, *, step_sequences: int = 4) -> None:
        scheduler = scheduler or Scheduler(
            BlockPool(BLOCKS, SIZE), step_tokens=16, step_sequences=step_sequences, context_length=64
        )
        self.runner = runner
        self.reports: SimpleQueue[Report] = SimpleQueue()
        self.failures: SimpleQueue[BaseException] = SimpleQueue()
        self.engine = Engine(scheduler, runner, on_failure=self.failures.put)
        self.engine.start(self.reports.put)

    def admit(self, *admissions: Admission) -> None:
        self.engine.submit(Commands(link=1, admissions=list(admissions)))

    def until(self, holds: Callable[[list[Report]], bool]) -> list[Report]:
        """Reports until a condition holds for those seen."""
        seen: list[Report] = []
        while not holds(seen):
            seen.append(self.reports.get(timeout=10))
        return seen

    def until_idle(self) -> list[Report]:
        return self.until(lambda seen: bool(seen) and not seen[-1].load.running and not seen[-1].load.waiting)


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(**options: float) -> Running:
        started.append(Running(FakeRunner(BLOCKS, SIZE, **options)))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for running in started:
        running.engine.stop()
        with pytest.raises(Empty):
            raise running.failures.get_nowait()


def tokens_of(reports: list[Report], attempt: int, link: int = 1) -> list[int]:
    return [
        token_id
        for report in reports
        if link in report.outcome.tokens
        for each, token_id in zip(
            report.outcome.tokens[link].attempts, report.outcome.tokens[link].token_ids, strict=True
        )
        if each == attempt
    ]


def test_sequences_run_to_their_end(start: Callable[..., Running]) -> None:
    running = start()
    running.admit(admission(PROMPT, attempt=1), admission([9, 8], attempt=2, max_count=3))
    reports = running.until_idle()
    assert tokens_of(reports, 1) == alone(PROMPT, 8)
    assert tokens_of(reports, 2) == alone([9, 8], 3)
    assert len(reports) == 8, "one report per step, whatever the batch"
    assert [report.load.steps for report in reports] == list(range(1, 9))
    assert reports[-1].load.free_blocks == BLOCKS


def test_sampling_follows_the_row(start: Callable[..., Running]) -> None:
    running = start()
    running.admit(admission(PROMPT, attempt=1, max_count=1, top_logprobs=2), admission([9, 8], attempt=2, max_count=1))
    (report,) = running.until_idle()
    tokens = report.outcome.tokens[1]
    assert tokens.top[0][0] == (tokens.token_ids[0], tokens.logprobs[0])
    assert tokens.logprobs[0] < 0 and tokens.top[0][1][1] <= tokens.logprobs[0]
    assert math.isnan(tokens.logprobs[1]) and tokens.top[1] == []


def test_a_grant_wakes_it(start: Callable[..., Running]) -> None:
    running = start()
    running.admit(admission(PROMPT, grant=2))
    first = running.until(lambda seen: len(tokens_of(seen, 1)) == 2)
    running.engine.submit(Commands(link=1, grants=[(1, 8)]))
    assert tokens_of(first, 1) + tokens_of(running.until_idle(), 1) == alone(PROMPT, 8)


def test_it_rests_while_there_is_nothing_to_do(start: Callable[..., Running]) -> None:
    running = start()
    running.admit(admission(PROMPT, max_count=1))
    before = running.until_idle()[-1]
    time.sleep(0.3)
    running.engine.submit(Commands(link=1, releases=[99]))
    after = running.reports.get(timeout=5)
    assert after.timings is None and after.load.steps == before.load.steps
    assert after.engine_cpu_ns - before.engine_cpu_ns < 30e6, "waiting costs no CPU time"


def test_commands_of_one_message_are_applied_together_and_in_order(start: Callable[..., Running]) -> None:
    running = start()
    running.engine.submit(
        Commands(
            link=1,
            admissions=[admission(PROMPT, attempt=1, grant=0), admission(PROMPT, attempt=2)],
            grants=[(1, 3)],
            releases=[2],
        )
    )
    reports = running.until(lambda seen: len(tokens_of(seen, 1)) == 3)
    assert tokens_of(reports, 2) == []
    assert len(running.runner.batches[0].chunks) == 1


def test_release_and_lost_links_reach_running_sequences(start: Callable[..., Running]) -> None:
    running = start(delay=0.01)
    running.admit(admission(PROMPT, attempt=1, max_count=50), admission([7], attempt=2, max_count=50))
    running.admit(admission([6], link=2, attempt=1, max_count=50))
    running.until(lambda seen: len(seen) == 2)
    running.engine.submit(Commands(link=1, releases=[1]))
    running.until(lambda seen: bool(seen) and seen[-1].load.running == 2)
    running.engine.submit(Commands(link=1, closes=True))
    running.until(lambda seen: bool(seen) and seen[-1].load.running == 1)
    running.engine.submit(Commands(link=2, closes=True))
    assert running.until_idle()[-1].load.free_blocks == BLOCKS


class GatedRunner(FakeRunner):
    """Computes a step once it may."""

    def __init__(self) -> None:
        super().__init__(BLOCKS, SIZE)
        self.inside, self.gate = threading.Semaphore(0), threading.Semaphore(0)

    def forward(self, batch: Batch) -> Logits:
        self.inside.release()
        assert self.gate.acquire(timeout=10)
        return super().forward(batch)


@pytest.mark.parametrize("victim", [1, 2, 3, 4], ids=["leader", "sibling", "alone", "waiting"])
def test_what_is_released_while_a_step_runs_is_not_in_the_next_one(victim: int) -> None:
    runner = GatedRunner()
    running = Running(runner, step_sequences=3)
    asked = [admission(PROMPT, attempt=each, generation_id=f"g{each}", max_count=20) for each in (1, 3, 4)]
    running.admit(asked[0], admission(PROMPT, attempt=2, generation_id="g2", fork_of=1, max_count=20), *asked[1:])
    for _ in range(3):
        assert runner.inside.acquire(timeout=10)
        runner.gate.release()
        before = running.reports.get(timeout=10).load
    assert (before.running, before.waiting) == (3, 1)
    assert runner.inside.acquire(timeout=10)  # the fourth step runs
    running.engine.submit(Commands(link=1, releases=[victim]))
    runner.gate.release()
    running.reports.get(timeout=10)
    assert runner.inside.acquire(timeout=10)
    runner.gate.release(1000)
    after = running.reports.get(timeout=10)
    assert f"g{victim}" not in after.generations
    assert set(after.generations) >= {f"g{each}" for each in (1, 2, 3) if each != victim}
    assert (after.load.running, after.load.waiting) == (3, 0)
    reports = running.until_idle()
    assert reports[-1].load.free_blocks == BLOCKS
    running.engine.stop()
    assert running.failures.empty()


def test_an_older_admission_is_ended_without_a_step(start: Callable[..., Running]) -> None:
    running = start()
    running.admit(admission(PROMPT, attempt=1, generation_id="g", grant=0))
    running.reports.get(timeout=5)
    running.engine.submit(Commands(link=2, admissions=[admission(PROMPT, link=2, generation_id="g", epoch=2, grant=0)]))
    (ended,) = running.reports.get(timeout=5).outcome.ended
    assert (ended.link, ended.attempt, type(ended.error)) == (1, 1, OwnerChanged)


def test_a_failing_sequence_fails_alone(start: Callable[..., Running]) -> None:
    running = start(poison=31)
    running.admit(admission([1, 31], attempt=1), admission(PROMPT, attempt=2))
    reports = running.until_idle()
    assert [(each.attempt, type(each.error)) for each in reports[0].outcome.ended] == [(1, InvalidLogits)]
    assert tokens_of(reports, 2) == alone(PROMPT, 8)


def test_time_is_accounted_for(start: Callable[..., Running]) -> None:
    running = start(delay=0.02)
    begin = time.monotonic_ns()
    running.admit(admission(PROMPT, max_count=3))
    timings = [report.timings for report in running.until_idle()]
    end = time.monotonic_ns()
    previous = begin
    for each in timings:
        assert each is not None
        assert each.forward >= 20e6 and each.schedule > 0 and each.sample > 0
        assert previous <= each.started
        assert each.started + each.schedule + each.forward + each.sample <= each.departed <= end
        previous = each.departed


class DeviceRunner(FakeRunner):
    """Says what a device took: as many nanoseconds as the batch has chunks, and nothing of the first step."""

    def forward(self, batch: Batch) -> Logits:
        logits = super().forward(batch)
        return logits._replace(device_ns=len(batch.chunks)) if len(self.batches) > 1 else logits


def test_what_a_device_took_is_told_of_its_step() -> None:
    running = Running(DeviceRunner(BLOCKS, SIZE))
    running.admit(admission(PROMPT, attempt=1, max_count=4), admission([9, 8], attempt=2, max_count=3))
    timings = [report.timings for report in running.until_idle()]
    running.engine.stop()
    assert [each.device for each in timings if each is not None] == [None, 2, 2, 1]


class TimedScheduler(Scheduler):
    """Remembers what it was told."""

    def close(self, batch: Batch, drawn: Drawn, seconds: float = 0.0) -> Outcome:
        self.told = [*getattr(self, "told", []), seconds]
        return super().close(batch, drawn, seconds)


def test_the_scheduler_is_told_how_long_steps_take() -> None:
    scheduler = TimedScheduler(BlockPool(BLOCKS, SIZE), step_tokens=16, step_sequences=4, context_length=64)
    running = Running(FakeRunner(BLOCKS, SIZE), scheduler)
    running.admit(admission(PROMPT, max_count=3))
    timings = [report.timings for report in running.until_idle()]
    running.engine.stop()
    assert len(scheduler.told) == 3
    for seconds, each in zip(scheduler.told, timings, strict=True):
        assert each is not None
        assert seconds == pytest.approx((each.schedule + each.forward + each.sample) / 1e9)


def test_stop_ends_the_thread(start: Callable[..., Running]) -> None:
    running = start(delay=0.01)
    running.admit(admission(PROMPT, max_count=50))
    running.reports.get(timeout=5)
    running.engine.stop()
    assert not any(thread.name == "engine" for thread in threading.enumerate())


@pytest.mark.parametrize("point", ["shard.admit", "shard.step.before_publish"])
def test_failpoints_are_passed(point: str) -> None:
    failpoints.configure({"FERMATA_FAILPOINTS": f"{point}:raise@2"}, testing=True)
    try:
        running = Running(FakeRunner(BLOCKS, SIZE))
        running.admit(admission(PROMPT, attempt=1))
        running.admit(admission(PROMPT, attempt=2))
        assert isinstance(running.failures.get(timeout=5), failpoints.FailpointError)
    finally:
        failpoints.configure({}, testing=False)


def test_an_unexpected_error_ends_the_process_with_a_status_that_is_not_zero() -> None:
    script = """
import time
from services.shard.blocks import BlockPool
from services.shard.engine import Commands, Engine
from services.shard.scheduler import Scheduler
from tests.unit.shard.fakes import admission

class Broken:
    def forward(self, batch):
        raise RuntimeError("out of memory")

engine = Engine(Scheduler(BlockPool(4, 4), step_tokens=4, step_sequences=4, context_length=16), Broken())
engine.start(print)
engine.submit(Commands(link=1, admissions=[admission([1, 2])]))
time.sleep(30)
"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    assert ended.returncode == FAILED
    assert "the engine failed" in ended.stderr and "out of memory" in ended.stderr


def test_a_batch_reads_as_its_runner_needs_it(start: Callable[..., Running]) -> None:
    running = start()
    running.admit(admission(PROMPT, max_count=2))
    running.until_idle()
    first, second = running.runner.batches
    assert first.copies == [] and first.rows[0].output_start == len(PROMPT)
    assert [(chunk.start, chunk.token_ids, len(chunk.block_table), chunk.draws) for chunk in first.chunks] == [
        (0, PROMPT, 2, True)
    ]
    assert second.chunks[0].block_table == first.chunks[0].block_table
