"""`make bench`, second part: the whole system on Ray Serve against the same system as plain processes.

Both are started as a user starts them, in turns and never at the same time, so that what Ray does in the background
counts against Serve alone. The same streams are read with the client library. Every figure is the median over rounds,
and each round compares its own two systems, so that a noisy machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from fermata.aio import AsyncClient
from services.config import BUILT_IN_MODEL
from services.local import processes
from tests.bench.workload import Workload
from tests.e2e.system import UpSystem

STREAMS = (1, 8, 32)
SERVICES = ("tokenizer", "orchestrator", "shard")
VOCABULARY = 4096
WIDTHS = (20, 9, 8, 18, 8, 8)
"""Of the columns of the table."""


class Figures(NamedTuple):
    """One system in one round.

    Attributes:
        rate: tokens per second of all streams together.
        interval: median seconds between two tokens of a stream.
    """

    rate: float
    interval: float


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=BUILT_IN_MODEL, help="folder of the model")
    parser.add_argument("--streams", default=",".join(map(str, STREAMS)), help="numbers of streams")
    parser.add_argument("--tokens", type=int, default=400, help="tokens per stream (1 stream: three times as many)")
    parser.add_argument("--rounds", type=int, default=4, help="starts of each system")
    return parser.parse_args(arguments)


async def read_all(address: str, workload: Workload) -> Figures:
    """Reads all streams of a workload."""
    intervals: list[float] = []
    async with AsyncClient(address) as client:
        began = time.perf_counter()

        async def read(prompt: list[int]) -> int:
            options = {"token_ids": prompt, "temperature": 0.0, "max_tokens": workload.tokens, "ignore_eos": True}
            last, count = 0.0, 0
            async with client.stream(**options) as stream:  # type: ignore[arg-type]
                async for _ in stream:
                    now, fresh = time.perf_counter(), len(stream.token_ids)
                    if count and fresh > count:
                        intervals.append((now - last) / (fresh - count))
                    last, count = now, fresh
            return count

        counts = await asyncio.gather(*(read(prompt) for prompt in workload.prompts()))
        seconds = time.perf_counter() - began
        assert sum(counts) == workload.total
    return Figures(workload.total / seconds, statistics.median(intervals))


def memory(pids: set[int]) -> float:
    """Sum of the proportional set sizes in GB: shared pages count once."""
    kilobytes = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        kilobytes += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kilobytes * 1024 / 1e9


def pids_of(system: UpSystem) -> set[int]:
    """All processes of a system, Ray's among them."""
    assert system.process is not None
    folder = system.ray_folder()
    ray = [item.pid for item in processes.using(folder)] if folder is not None else []
    return {system.process.pid, *system.pids(), *ray}


def replacement_seconds(system: UpSystem, service: str) -> float:
    """From SIGKILL to the only replica of a service until its successor is told of to everybody."""
    killed = system.kill(service)
    began = time.monotonic()
    while True:
        replicas = system.status()["deployments"].get(service, [])
        if [item["state"] for item in replicas] == ["RUNNING"] and replicas[0]["pid"] != killed:
            return time.monotonic() - began


def run(options: argparse.Namespace) -> None:
    """Starts, reads, compares, prints."""
    streams = [int(part) for part in options.streams.split(",")]
    found: dict[tuple[str, int], list[Figures]] = defaultdict(list)
    starts: dict[str, list[float]] = defaultdict(list)
    sizes: dict[str, list[float]] = defaultdict(list)
    replaced: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(options.rounds):
        kinds = ("plain", "serve") if number % 2 else ("serve", "plain")
        for kind in kinds:
            print(f"\rround {number + 1} of {options.rounds}, {kind}  ", end="", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="fermata-bench-") as folder:
                arguments = ("--model", options.model)
                with UpSystem(Path(folder) / "state", *arguments, local=kind == "plain") as system:
                    starts[kind].append(system.ready_seconds)
                    for count in streams:
                        tokens = options.tokens * (3 if count == 1 else 1)
                        workload = Workload(count, tokens, 16, VOCABULARY, number)
                        asyncio.run(read_all(system.address, Workload(count, 20, 16, VOCABULARY, -1)))
                        found[kind, count].append(asyncio.run(read_all(system.address, workload)))
                    sizes[kind].append(memory(pids_of(system)))
                    for service in SERVICES:
                        replaced[kind, service].append(replacement_seconds(system, service))
    print("\r" + " " * 40, end="\r", file=sys.stderr)
    print(f"{options.rounds} rounds, {options.tokens} tokens per stream, {os.cpu_count()} cores\n")
    print_table(found, streams)
    for kind in ("serve", "plain"):
        start, size = statistics.median(starts[kind]), statistics.median(sizes[kind])
        print(f"{kind}: ready in {start:.1f} s, {size:.2f} GB of memory (sum of PSS of all processes)")
        times = [f"{service} {statistics.median(replaced[kind, service]):.1f} s" for service in SERVICES]
        print(f"       killed replicas are replaced after: {', '.join(times)}")


def print_table(found: dict[tuple[str, int], list[Figures]], streams: list[int]) -> None:
    """One line per number of streams."""
    head = ("tokens/s on Serve", "plain", "ratio", "p50 ms on Serve", "plain", "added")
    print(f"{'streams':>7}" + "".join(f"{name:>{width}}" for name, width in zip(head, WIDTHS, strict=True)))
    for count in streams:
        serve, plain = found["serve", count], found["plain", count]
        ratio = statistics.median(a.rate / b.rate for a, b in zip(serve, plain, strict=True))
        added = statistics.median(a.interval - b.interval for a, b in zip(serve, plain, strict=True))
        rates = [statistics.median(item.rate for item in items) for items in (serve, plain)]
        gaps = [1e3 * statistics.median(item.interval for item in items) for items in (serve, plain)]
        cells = (*(f"{rate:.0f}" for rate in rates), f"{ratio:.3f}", *(f"{gap:.3f}" for gap in (*gaps, 1e3 * added)))
        print(f"{count:>7}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)))


if __name__ == "__main__":
    run(parse())
