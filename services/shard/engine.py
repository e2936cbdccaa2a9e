"""The loop of a shard, in a thread of its own: schedule, forward, sample, publish.

Commands come in through a queue and are applied between steps; results go out with one call into the event loop per
step. The thread waits on the queue while there is nothing to compute. A sequence whose logits are no numbers fails
alone; any other error in the loop is a bug, and a shard with unknown state must not go on: the process ends with a
status that is not zero, and whoever watches it starts another one.

Knows neither links nor messages (`service.py`), nor what a model is (`runner.py` comes as a `Runner`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple, Protocol

from services.common import failpoints, sampling
from services.shard.outcome import Ended, Load, Outcome
from services.shard.scheduler import Batch, Scheduler
from services.shard.sequence import Admission

if TYPE_CHECKING:
    from services.shard.kernels.interface import Logits

log = logging.getLogger(__name__)

FAILED = 70
"""Exit status after an error in the loop (EX_SOFTWARE of sysexits.h)."""


_NO_BATCH = Batch([], [])


class Runner(Protocol):
    """What the engine needs of a model."""

    def forward(self, batch: Batch) -> Logits:
        """Copies and computes the KV of a batch."""
        ...


@dataclass(frozen=True, slots=True)
class Commands:
    """What one message of a link asks for, applied in the order of the fields and together.

    Attributes:
        link: who sends it.
        admissions: new sequences.
        grants: (attempt, count) each.
        releases: attempts that end.
        closes: the link is gone, all of its sequences end.
    """

    link: int
    admissions: list[Admission] = field(default_factory=list)
    grants: list[tuple[int, int]] = field(default_factory=list)
    releases: list[int] = field(default_factory=list)
    closes: bool = False


class Timings(NamedTuple):
    """Where the time of a step went (R25), in nanoseconds of the shard's monotonic clock.

    `forward` is what the host waited for; `device` is what a device beside it took of that, by its own clock.
    """

    started: int
    schedule: int
    forward: int
    sample: int
    departed: int
    device: int | None = None


class Report(NamedTuple):
    """What the engine tells after a step, or after commands that changed something without one.

    `load.steps` is the number of the step; `engine_cpu_ns` the CPU time of the engine's thread so far; `generations`
    says whose sequences were in the step, and `lengths` how many tokens of each were computed.
    """

    outcome: Outcome
    load: Load
    engine_cpu_ns: int
    timings: Timings | None
    generations: list[str]
    lengths: list[int]


def end_process(error: BaseException) -> None:
    """Ends the process at once: its links break, and the orchestrators go elsewhere."""
    log.critical("the engine failed", exc_info=error)
    logging.shutdown()
    os._exit(FAILED)


class Engine:
    """Runs a scheduler and a runner.

    Args:
        scheduler: belongs to the engine's thread from `start` on.
        runner: likewise.
        on_failure: called on the engine's thread with an error that it cannot survive.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, *, on_failure: Callable[[BaseException], None] = end_process
    ) -> None:
        self._scheduler, self._runner, self._on_failure = scheduler, runner, on_failure
        self._inbox: SimpleQueue[Commands | None] = SimpleQueue()
        self._post: Callable[[Report], object]
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, post: Callable[[Report], object]) -> None:
        """Starts the thread.

        Args:
            post: called on the engine's thread with each report; must hand it on without waiting.
        """
        self._post = post
        self._thread.start()

    def submit(self, commands: Commands) -> None:
        """Hands commands to the loop; never waits. May be called from any thread."""
        self._inbox.put(commands)

    def stop(self) -> None:
        """Ends the loop after the current step and waits for that."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # nothing may end this thread silently
            self._on_failure(error)

    def _loop(self) -> None:
        now = time.monotonic_ns
        while self._receive():
            stamps = [now()]
            batch = self._scheduler.next()  # pure: who runs, which blocks
            stamps.append(now())
            logits = self._runner.forward(batch)  # tensors in, tensors out
            stamps.append(now())
            tokens = sampling.draw(logits.values, batch.rows, best=logits.best)  # one pure function
            stamps.append(now())
            outcome = self._scheduler.close(batch, tokens, (stamps[-1] - stamps[0]) / 1e9)
            self._publish(outcome, batch, stamps, logits.device_ns)

    def _receive(self) -> bool:
        """Applies the commands that have come, and waits for some while there is nothing to compute.

        Returns:
            Whether to go on.
        """
        while not self._inbox.empty() or not self._scheduler.has_work:
            commands = self._inbox.get()
            if commands is None:
                return False
            ended = self._apply(commands)
            if ended or not self._scheduler.has_work:
                self._publish(Outcome(ended=ended))
        return True

    def _apply(self, commands: Commands) -> list[Ended]:
        scheduler, ended = self._scheduler, []
        for admission in commands.admissions:
            failpoints.hit("shard.admit")
            ended += scheduler.admit(admission)
        for attempt, count in commands.grants:
            scheduler.grant(commands.link, attempt, count)
        for attempt in commands.releases:
            scheduler.release(commands.link, attempt)
        if commands.closes:
            scheduler.release_link(commands.link)
        return ended

    def _publish(
        self, outcome: Outcome, batch: Batch = _NO_BATCH, stamps: Sequence[int] = (), device_ns: int | None = None
    ) -> None:
        """Hands results on, with the moments at which the step began and its three parts were done."""
        timings = None
        if stamps:
            failpoints.hit("shard.step.before_publish")
            started, scheduled, forwarded, sampled = stamps
            timings = Timings(
                started, scheduled - started, forwarded - scheduled, sampled - forwarded, time.monotonic_ns(), device_ns
            )
        lengths = [len(chunk.token_ids) for chunk in batch.chunks]
        self._post(Report(outcome, self._scheduler.load, time.thread_time_ns(), timings, batch.generations, lengths))
