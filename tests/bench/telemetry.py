"""`make bench`, third part: what it costs to know where the time of every token went.

Two systems run side by side, as plain processes: one tells everything (figures for Prometheus and by OTLP, a span tree
per request, a span per token for a share of them, all of it to a collector that is there), the other tells nothing.
They are read in turns; a round compares the CPU seconds per token of its own two. The client and the collector do not
count.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from pathlib import Path

from opentelemetry.proto.metrics.v1.metrics_pb2 import NumberDataPoint

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


def system_cpu(system: UpSystem) -> float:
    """CPU seconds of all services so far."""
    return sum(cpu_seconds({str(pid): pid for pid in system.pids()}).values())


def run(options: argparse.Namespace) -> None:
    """Starts both, reads in turns, compares, prints."""
    ratios, costs = [], []
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
                used = {}
                for system in (on, off) if number % 2 else (off, on):
                    before = system_cpu(system)
                    asyncio.run(read_all(system.address, workload))
                    used[system] = (system_cpu(system) - before) / workload.total
                ratios.append(used[on] / used[off])
                costs.append(used[on] - used[off])
        print("\r" + " " * 40, end="\r", file=sys.stderr)
        tokens = sum(1 for span in receiver.spans if span.name == "token")
        dropped = sum(point.as_double or point.as_int for point in _points(receiver, "fermata.spans.dropped"))
    ratios.sort()
    print(f"{options.rounds} pairs, {options.streams} streams of {options.tokens} tokens, {os.cpu_count()} cores")
    print(f"CPU per token, on / off: median {statistics.median(ratios):.3f}, all {ratios[0]:.3f} to {ratios[-1]:.3f}")
    print(f"added: median {1e6 * statistics.median(costs):.1f} microseconds of CPU per token")
    print(f"the collector got {len(receiver.spans)} spans, {tokens} of them of tokens; {dropped:.0f} were dropped")


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
