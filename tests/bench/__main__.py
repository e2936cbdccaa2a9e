"""`make bench`: what each hop of the house costs, at 1, 8 and 32 streams.

The same generations are run by the engine alone, then with one more hop at a time: over the shard's link, through an
orchestrator with its session store, through a tokenizer, and with the client library. Rounds are interleaved, so that
a noisy machine disturbs all levels alike, and every figure is the median over rounds. CPU time is the kernel's, per
process; the engine's own thread is shown apart, because it is what the rest is held against.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from services.config import BUILT_IN_MODEL
from tests.bench.levels import LEVELS
from tests.bench.processes import System, cpu_seconds
from tests.bench.workload import Workload

STREAMS = (1, 8, 32)
ALONE = "engine alone"
BARE = "(one bare gRPC hop)"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=BUILT_IN_MODEL, help="folder of the model")
    parser.add_argument("--streams", default=",".join(map(str, STREAMS)), help="numbers of streams")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per stream (1 stream: three times as many)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per level")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of the shard")
    parser.add_argument("--levels", default="", help="only those whose name contains this, besides the engine alone")
    parser.add_argument("--prompt", type=int, default=16, help="prompt tokens per stream")
    return parser.parse_args(arguments)


class Samples:
    """Figures of all rounds, by (streams, level)."""

    def __init__(self) -> None:
        self.rates: dict[tuple[int, str], list[float]] = defaultdict(list)
        self.ratios: dict[tuple[int, str], list[float]] = defaultdict(list)
        self.cpu: dict[tuple[int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.store_calls: list[float] = []


async def measure(system: System, workload: Workload, samples: Samples, wanted: str) -> None:
    """One round: every wanted level once."""
    alone = 0.0
    for level, run in LEVELS.items():
        if wanted not in level and level != ALONE:
            continue
        # The engine's time comes with a heartbeat: waiting for that must not count.
        engine_before = await system.engine_seconds()
        before = cpu_seconds(system.pids)
        seconds = await run(system, workload)
        after = cpu_seconds(system.pids)
        engine_after = await system.engine_seconds()
        key = (workload.streams, level)
        rate = workload.total / seconds
        alone = rate if level == ALONE else alone
        samples.rates[key].append(rate)
        samples.ratios[key].append(rate / alone)
        if level == ALONE:
            continue
        engine = engine_after - engine_before
        for name in before:
            spent = after[name] - before[name] - (engine if name == "shard" else 0.0)
            samples.cpu[key][name].append(1e6 * spent / workload.total)
        samples.cpu[key]["engine"].append(1e6 * engine / workload.total)


COLUMNS = ("client", "tokenizer", "orchestrator", "store", "shard", "bare")


def print_table(samples: Samples, streams: list[int]) -> None:
    """The result, one line per level."""
    print(f"{'streams':>7}  {'level':<22}{'tokens/s':>9}{'ms/token':>10}{'÷ alone':>9}   CPU µs per token")
    print(" " * 60 + "".join(f"{name:>13}" for name in (*COLUMNS, "together", "(engine)")))
    for count in streams:
        for level in LEVELS:
            key = (count, level)
            if not samples.rates[key]:
                continue
            rate = statistics.median(samples.rates[key])
            ratio = statistics.median(samples.ratios[key])
            speed = f"{rate:>9.0f}{1e3 * count / rate:>10.2f}{ratio:>9.2f}" if level != BARE else " " * 28
            print(f"{count:>7}  {level:<22}{speed}   {_cpu_cells(samples.cpu[key])}")
        print()


def _cpu_cells(samples: dict[str, list[float]]) -> str:
    """CPU time per process; what took next to nothing is left out."""
    if not samples:
        return ""
    spent = {name: statistics.median(values) for name, values in samples.items()}
    cells = [spent[name] for name in COLUMNS]
    return "".join(f"{cell:>13.0f}" if cell >= 1 else " " * 13 for cell in [*cells, sum(cells), spent["engine"]])


async def run(options: argparse.Namespace) -> None:
    """Starts the processes, measures, prints."""
    streams = [int(part) for part in options.streams.split(",")]
    samples = Samples()
    with tempfile.TemporaryDirectory(prefix="fermata-bench-") as folder:
        async with System(Path(folder), options.model, options.threads) as system:
            for round_number in range(options.rounds + 1):  # the first one only warms up
                for count in streams:
                    tokens = options.tokens * (3 if count == 1 else 1)
                    workload = Workload(count, tokens, options.prompt, system.vocabulary_size, round_number)
                    print(f"\rround {round_number} of {options.rounds}, {count} streams  ", end="", file=sys.stderr)
                    await measure(system, workload, samples if round_number else Samples(), options.levels)
            print("\r" + " " * 40, end="\r", file=sys.stderr)
            facts = await system.orchestrator_facts()
    load = os.getloadavg()[0]
    print(f"{options.rounds} rounds, {options.tokens} tokens per stream, {os.cpu_count()} cores, load {load:.1f}\n")
    print_table(samples, streams)
    print(
        f"session store: {facts.store_flushes} writes for {facts.stored_tokens} tokens"
        f" ({facts.store_flushes / max(1, facts.stored_tokens):.3f} per token), all of them beside the step loop"
    )


if __name__ == "__main__":
    asyncio.run(run(parse()))
