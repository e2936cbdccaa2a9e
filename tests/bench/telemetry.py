"""`make bench`, third part: what it costs to know where the time of every token went.

Two systems run side by side, as plain processes: one tells everything (figures for Prometheus and by OTLP, a span tree
per request, a span per token for a share of them, all of it to a collector that is there), the other tells nothing.
They are read in turns; a round compares the CPU seconds per token of its own two. The client and the collector do not
count. The engine's thread does the same in both, but its time differs by a tenth from one process to the next, with the
memory that it happens to get; so it is shown apart, and the ratio is also told with the same engine time in both.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from opentelemetry.proto.metrics.v1.metrics_pb2 import NumberDataPoint

from fermata import Client
from services.config import BUILT_IN_MODEL
from tests.bench.processes import cpu_seconds
from tests.bench.serve import VOCABULARY, read_all
from tests.bench.workload import Workload
from tests.e2e.system import UpSystem
from tests.unit.common.otlp_receiver import Receiver, receiving

SILENT = {"FERMATA_METRICS_PORT": "-1", "FERMATA_TRACE_MEMORY": "0"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=BUILT_IN_MODEL, help="folder of the model")
    parser.add_argument("--streams", type=int, default=32, help="number of streams")
    parser.add_argument("--tokens", type=int, default=400, help="tokens per stream")
    parser.add_argument("--rounds", type=int, default=12, help="pairs of runs")
    parser.add_argument("--waterfalls", default="0.01", help="share of the requests with a span per token")
    return parser.parse_args(arguments)


class Used(NamedTuple):
    """CPU seconds of a system so far: of all its services, and of the engine's thread alone."""

    all: float
    engine: float

    def per_token(self, before: Used, tokens: int) -> Used:
        """What was used since, in microseconds per token."""
        return Used(*(1e6 * (now - then) / tokens for now, then in zip(self, before, strict=True)))


def used(system: UpSystem) -> Used:
    """What a system has used so far."""
    services = sum(cpu_seconds({str(pid): pid for pid in system.pids()}).values())
    with Client(system.address) as client:
        figures = [figure for replica in client.statistics().replicas for figure in replica.figures]
    return Used(services, sum(figure.value for figure in figures if figure.name == "fermata.engine.cpu"))


def run(options: argparse.Namespace) -> None:
    """Starts both, reads in turns, compares, prints."""
    pairs: list[tuple[Used, Used]] = []
    with tempfile.TemporaryDirectory(prefix="fermata-bench-") as folder, receiving() as receiver:
        telling = {"FERMATA_OTLP_ENDPOINT": receiver.endpoint, "FERMATA_WATERFALL_SHARE": options.waterfalls}
        arguments = ("--model", options.model)
        with (
            UpSystem(Path(folder) / "on" / "state", *arguments, environment=telling) as on,
            UpSystem(Path(folder) / "off" / "state", *arguments, environment=SILENT) as off,
        ):
            for system in (on, off):
                asyncio.run(read_all(system.address, Workload(options.streams, 20, 16, VOCABULARY, -1)))
            for number in range(options.rounds):
                print(f"\rround {number + 1} of {options.rounds}  ", end="", file=sys.stderr, flush=True)
                workload = Workload(options.streams, options.tokens, 16, VOCABULARY, number)
                found = {}
                for system in (on, off) if number % 2 else (off, on):
                    before = used(system)
                    asyncio.run(read_all(system.address, workload))
                    found[system] = used(system).per_token(before, workload.total)
                pairs.append((found[on], found[off]))
        print("\r" + " " * 40, end="\r", file=sys.stderr)
        tokens = sum(1 for span in receiver.spans if span.name == "token")
        dropped = sum(point.as_double or point.as_int for point in _points(receiver, "fermata.spans.dropped"))
    print(f"{options.rounds} pairs, {options.streams} streams of {options.tokens} tokens, {os.cpu_count()} cores")
    print_ratio("as measured", [telling.all / silent.all for telling, silent in pairs])
    added = [(telling.all - telling.engine) - (silent.all - silent.engine) for telling, silent in pairs]
    same_engine = [1 + more / silent.all for more, (_, silent) in zip(added, pairs, strict=True)]
    print_ratio("with the same engine time in both", same_engine)
    silent, engine = (statistics.median(item) for item in zip(*(pair[1] for pair in pairs), strict=True))
    more = statistics.median(added)
    print(f"added: median {more:.1f} microseconds per token to {silent:.0f}, {engine:.0f} of which are the engine's")
    print(f"the collector got {len(receiver.spans)} spans, {tokens} of them of tokens; {dropped:.0f} were dropped")


def print_ratio(name: str, ratios: list[float]) -> None:
    """The median with the quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"CPU per token, on / off, {name}: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")


def _points(receiver: Receiver, name: str) -> list[NumberDataPoint]:
    """The last values of a counter, one per process."""
    last: dict[str, NumberDataPoint] = {}
    for process in receiver.resource_metrics:
        names = {item.key: item.value.string_value for item in process.resource.attributes}
        instance = names["service.instance.id"]
        for metric in (metric for scope in process.scope_metrics for metric in scope.metrics if metric.name == name):
            last[instance] = metric.sum.data_points[-1]
    return list(last.values())


if __name__ == "__main__":
    run(parse())
