"""`python -m tests.bench.engine`: the engine alone, in a process of its own; prints the seconds that a workload took.

No gRPC, no other process: what every further hop is held against.
"""

from __future__ import annotations

import argparse
import threading
import time

from services.common.sampling import Row
from services.common.telemetry import Telemetry, TelemetrySettings
from services.common.types import SamplingProgram
from services.config import ShardConfig
from services.shard.engine import Commands, Engine, Report
from services.shard.sequence import Admission
from services.shard.serving import build
from tests.bench.workload import Workload


def run(engine: Engine, reports: list[Report], done: threading.Event, workload: Workload, name: str) -> float:
    """Runs all streams of a workload; returns seconds."""
    admissions = []
    for number, prompt in enumerate(workload.prompts(), 1):
        token_ids = list(prompt)
        row = Row(program=SamplingProgram(), token_ids=token_ids, output_start=len(prompt), choice=0)
        admissions.append(
            Admission(
                link=1,
                attempt=number,
                generation_id=f"{name}-{number}",
                epoch=1,
                tenant=name,
                token_ids=token_ids,
                row=row,
                max_count=workload.tokens,
                grant=workload.tokens,
            )
        )
    began, received = time.perf_counter(), 0
    engine.submit(Commands(link=1, admissions=admissions))
    while received < workload.total:
        done.wait()
        done.clear()
        while reports:
            tokens = reports.pop().outcome.tokens.get(1)
            received += len(tokens.token_ids) if tokens is not None else 0
    return time.perf_counter() - began


def main() -> None:
    """Builds a shard's engine, warms it up, runs the workload once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    for name in ("streams", "tokens", "prompt", "seed", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    service = build(
        ShardConfig(model=options.model, threads=options.threads),
        Telemetry("shard", TelemetrySettings(recorded_bytes=0)),
    )
    engine, size = service.engine, service.description.vocabulary_size
    reports: list[Report] = []
    done = threading.Event()

    def post(report: Report) -> None:
        reports.append(report)
        done.set()

    engine.start(post)
    run(engine, reports, done, Workload(options.streams, 20, options.prompt, size, -1), "warm")
    workload = Workload(options.streams, options.tokens, options.prompt, size, options.seed)
    print(run(engine, reports, done, workload, "measured"))
    engine.stop()


if __name__ == "__main__":
    main()
