"""`python -m tests.bench.neighbours`: what a prompt that fills the whole context costs those who stream beside it.

Sixteen streams run on the real engine, alone and beside such a prompt, in turns. Printed are the times between two
tokens of a stream in both cases, and the bound that the shard's setting `step_time` states: a step without prompts,
that time, and a minimal chunk of a prompt at the end of the context. Their times are measured in the same run.

Other work on the machine makes gaps that no scheduler can foresee. So the same gaps are also told in CPU time of the
engine's thread, which stands still meanwhile.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NamedTuple

from services.common.sampling import Row
from services.common.telemetry import Telemetry, TelemetrySettings
from services.common.types import SamplingProgram
from services.config import BUILT_IN_MODEL, ShardConfig
from services.shard.engine import Commands, Engine, Report
from services.shard.pacing import MINIMAL_CHUNK
from services.shard.sequence import Admission
from services.shard.serving import build

STREAM_PROMPT, TARGET = 32, 2.5
"""Prompt tokens of a stream, and how many times longer than alone the 99th percentile may be."""


class Gap(NamedTuple):
    """Milliseconds between two tokens of a stream: that passed, and that the engine's thread computed."""

    passed: float
    computed: float


@dataclass
class Measured:
    """What was seen, in milliseconds.

    Attributes:
        alone: the gaps of streams, no prompt there.
        beside: the gaps while the prompt was computed.
        prompts: from the admission of the prompt to its first token.
        lone_prompts: the same without streams.
        minimal: a step of a minimal chunk at the end of the context.
    """

    alone: list[Gap] = field(default_factory=list)
    beside: list[Gap] = field(default_factory=list)
    prompts: list[float] = field(default_factory=list)
    lone_prompts: list[float] = field(default_factory=list)
    minimal: list[float] = field(default_factory=list)


class Bench:
    """An engine with what it reports."""

    def __init__(self, config: ShardConfig) -> None:
        service = build(config, Telemetry("shard", TelemetrySettings(recorded_bytes=0)))
        self.engine: Engine = service.engine
        self.vocabulary_size = service.description.vocabulary_size
        self.block_size, self.context = service.description.block_size, service.description.context_length
        self._reports: SimpleQueue[Report] = SimpleQueue()
        self._attempts = itertools.count(1)
        self._random = random.Random(1)
        self._latest: dict[int, Gap] = {}  # when an attempt got its latest token
        self.engine.start(self._reports.put)

    def ids(self, count: int) -> list[int]:
        """Ids from the middle of the vocabulary, where no control token is."""
        return self._random.choices(range(self.vocabulary_size // 4, 3 * self.vocabulary_size // 4), k=count)

    def admit(self, prompts: list[list[int]], max_count: int) -> list[int]:
        """Admits greedy sequences; returns their attempts."""
        admissions = []
        for prompt in prompts:
            token_ids, attempt = list(prompt), next(self._attempts)
            row = Row(program=SamplingProgram(), token_ids=token_ids, output_start=len(prompt), choice=0)
            admissions.append(Admission(1, attempt, f"{attempt}", 1, "bench", token_ids, row, max_count, max_count))
        self.engine.submit(Commands(link=1, admissions=admissions))
        return [each.attempt for each in admissions]

    def follow(self, gaps: list[Gap], until: Callable[[Report, list[int]], bool]) -> Report:
        """Takes reports until a condition holds for one and the attempts that drew in it; adds the gaps."""
        while True:
            report = self._reports.get(timeout=600)
            tokens = report.outcome.tokens.get(1)
            drew = tokens.attempts if tokens is not None else []
            for attempt in drew:
                assert report.timings is not None
                now = Gap(report.timings.departed / 1e6, report.engine_cpu_ns / 1e6)
                before = self._latest.get(attempt)
                if before is not None:
                    gaps.append(Gap(now.passed - before.passed, now.computed - before.computed))
                self._latest[attempt] = now
            if until(report, drew):
                return report

    def first_token(self, prompt: list[int], gaps: list[Gap]) -> tuple[float, int]:
        """Admits a prompt for one token; returns the milliseconds from the step it began in, and its steps."""
        (attempt,) = self.admit([prompt], 1)
        steps: list[Report] = []

        def done(report: Report, drew: list[int]) -> bool:
            if str(attempt) in report.generations:
                steps.append(report)
            return attempt in drew

        self.follow(gaps, done)
        first, last = steps[0].timings, steps[-1].timings
        assert first is not None and last is not None
        return (last.departed - first.started) / 1e6, len(steps)

    def round(self, streams: int, steps: int, measured: Measured) -> None:
        """The streams alone for so many steps, then beside the prompt, then the prompt alone."""
        attempts = self.admit([self.ids(STREAM_PROMPT) for _ in range(streams)], self.context)
        self.follow([], lambda _, drew: len(drew) == streams)
        self.follow([], _after(10))
        self.follow(measured.alone, _after(steps))
        prompt = self.ids(self.context - 1)
        measured.prompts.append(self.first_token(prompt, measured.beside)[0])
        self.engine.submit(Commands(link=1, releases=attempts))
        lone = self.ids(self.context - 1)
        measured.lone_prompts.append(self.first_token(lone, [])[0])
        # Full blocks of the prompt are found again, so that this one is computed in one small chunk behind them.
        known = (len(lone) - 1) // self.block_size * self.block_size
        milliseconds, count = self.first_token([*lone[:known], *self.ids(MINIMAL_CHUNK)], [])
        assert count == 1, "the prefix was not found"
        measured.minimal.append(milliseconds)


def _after(steps: int) -> Callable[[Report, list[int]], bool]:
    left = iter(range(steps - 1))
    return lambda _report, _drew: next(left, None) is None


def quantile(values: list[float], share: float) -> float:
    """The value that this share of all does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def tell(measured: Measured, step_time: float) -> None:
    """Prints the tables."""
    minimal = quantile(measured.minimal, 0.5)
    for place, kind in enumerate(("milliseconds that passed", "milliseconds of CPU time")):
        alone, beside = ([gap[place] for gap in gaps] for gaps in (measured.alone, measured.beside))
        step = quantile(alone, 0.5)
        bound = step + step_time + minimal if step_time else float("inf")
        print(f"{f'between two tokens, {kind}':<46}{'gaps':>7}{'p50':>8}{'p99':>8}{'max':>8}{'above bound':>13}")
        for name, gaps in (("streams alone", alone), ("beside the prompt", beside)):
            quantiles = "".join(f"{value:8.1f}" for value in (quantile(gaps, 0.5), quantile(gaps, 0.99), max(gaps)))
            print(f"{name:<46}{len(gaps):>7}{quantiles}{sum(gap > bound for gap in gaps):>13}")
        if step_time:
            print(f"bound: {bound:.1f} = {step:.1f} step alone + {step_time:g} step_time + {minimal:.1f} minimal chunk")
        ratio = quantile(beside, 0.99) / quantile(alone, 0.99)
        print(f"p99 beside / alone: {ratio:.2f} (target: at most {TARGET})\n")
    together, lone = quantile(measured.prompts, 0.5), quantile(measured.lone_prompts, 0.5)
    print(f"first token of the prompt: after {together:.0f} ms beside the streams, {lone:.0f} ms alone")


def main() -> None:
    """Runs the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=BUILT_IN_MODEL, help="folder of the model")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100, help="steps of the streams alone, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--step-time", type=float, default=ShardConfig().step_time, help="the shard's setting, ms")
    options = parser.parse_args()
    config = ShardConfig(model=options.model, threads=options.threads, step_time=options.step_time)
    bench, measured = Bench(config), Measured()
    bench.round(options.streams, 10, Measured())  # warms up
    gc.freeze()  # as a shard does
    for _ in range(options.rounds):
        bench.round(options.streams, options.steps, measured)
    bench.engine.stop()
    print(f"{bench.context - 1} prompt tokens beside {options.streams} streams, {options.rounds} rounds")
    tell(measured, options.step_time)


if __name__ == "__main__":
    main()
