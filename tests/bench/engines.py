"""`make bench-engine`: this engine beside others on the same model, with the same prompts, on the same cores.

Each engine is a process that loads the model once. Within a round the engines take turns at each task, all of them
idle but one, so that a noisy machine disturbs all alike; what counts are medians of ratios within rounds. Beside each
measurement stand the bandwidth of memory and what other processes used; a disturbed one is repeated, and kept as
disturbed when that does not help. All measurements go to a file of rows, from which the report is made, any time.

Engines that are not installed are left out: `python -m tests.bench.peers.prepare` installs them. Knows what is
measured and when; nothing of how an engine is spoken to, or of what is printed.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench import report
from tests.bench.figures import Kind, Row, Task, step_bytes
from tests.bench.machine import Bandwidth, ForeignLoad, describe, peak
from tests.bench.peers import prepare
from tests.bench.peers.hosted import EngineFailed, HostedEngine
from tests.bench.peers.registry import ENGINES, OURS, PRECISIONS
from tests.bench.peers.shapes import SHAPES
from tests.bench.rows import RowFile, Run

BATCHES = (1, 8, 32)
PROMPT, OUTPUT = 128, 128
PREFILL = 1024
CONTEXTS, CONTEXT_OUTPUT = (128, 256, 512, 1024, 2048), 33
ATTEMPTS, ATTEMPTS_SECONDS = 4, 20.0
"""How often a disturbed measurement is repeated, and how long."""
SETTLE_SECONDS = 0.3
"""Time for the threads of the engine before to stop spinning."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m", help="shape of the model")
    parser.add_argument("--engines", default=",".join(ENGINES), help="which, separated by commas")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="which, separated by commas")
    batches = ",".join(map(str, BATCHES))
    parser.add_argument("--batches", default=batches, help="sequences per step of decode; '' leaves decode out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of each engine, and of the probes")
    parser.add_argument("--contexts", action="store_true", help="this engine over the length of the context, too")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="for rows, logs and reports")
    parser.add_argument("--report", action="store_true", help="measure nothing, report what is there")
    options = parser.parse_args(arguments)
    for name, known in (("engines", ENGINES), ("precisions", PRECISIONS)):
        chosen = getattr(options, name).split(",")
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        setattr(options, name, chosen)
    options.batches = [int(batch) for batch in options.batches.split(",") if batch]
    return options


def tasks(batches: list[int]) -> list[Task]:
    """What all engines do."""
    decode = [Task(kind=Kind.DECODE, batch=batch, prompt=PROMPT, tokens=OUTPUT) for batch in batches]
    return [*decode, Task(kind=Kind.PREFILL, batch=1, prompt=PREFILL)]


def context_tasks(common: list[Task]) -> list[Task]:
    """What this engine does besides: a token behind a context, with its KV cache and by computing all of it again."""
    cached = [Task(kind=Kind.DECODE, batch=1, prompt=length, tokens=CONTEXT_OUTPUT) for length in CONTEXTS]
    again = [Task(kind=Kind.PREFILL, batch=1, prompt=length) for length in CONTEXTS]
    return [task for task in (*cached, *again) if task not in common]


class Bench:
    """Measures the engines of one precision after the other; writes rows."""

    def __init__(self, options: argparse.Namespace, rows: RowFile) -> None:
        self._options, self._rows = options, rows
        self._shape = SHAPES[options.model]
        self._seed = itertools.count()
        self._run = time.strftime("%Y-%m-%d %H:%M:%S")
        self._bandwidth = Bandwidth(options.folder / "probes", options.threads)
        self._engines: list[HostedEngine] = []

    def run(self) -> None:
        """Measures all that was asked for."""
        options = self._options
        rates = peak(options.folder / "probes", options.threads)
        run = Run(run=self._run, machine=describe(), threads=options.threads, peak=rates)
        self._rows.add(run)
        for precision in options.precisions:
            with self._started(precision):
                self._rows.add(run.with_versions({each.engine.name: each.version for each in self._engines}))
                self._in_turns(0, self._warm_up)
                self._compare_tokens(precision)
                for number in range(1, options.rounds + 1):
                    self._round(precision, number)
        self._bandwidth.close()

    def _round(self, precision: str, number: int) -> None:
        common = tasks(self._options.batches)
        special = context_tasks(common) if self._options.contexts else []
        for task in [*common, *special]:

            def measure(engine: HostedEngine, task: Task = task) -> None:
                if task not in special or engine.engine.name == OURS:
                    _tell(
                        f"{precision}, round {number}: {task.kind} {task.batch} x {task.prompt}, {engine.engine.name}"
                    )
                    self._rows.add(self._measure(engine, task, precision, number))

            self._in_turns(number, measure)

    @contextmanager
    def _started(self, precision: str) -> Iterator[None]:
        """Starts the engines that are installed and have the precision; ends them."""
        self._engines = []
        for name in self._options.engines:
            engine = ENGINES[name]
            if precision not in engine.forms:
                continue
            if not prepare.is_installed(engine):
                _tell(f"{name} is not installed: left out", stays=True)
                continue
            try:
                model = prepare.model(engine.forms[precision], self._options.model)
            except subprocess.CalledProcessError as error:
                _tell(f"{name}: {error}: left out", stays=True)
                continue
            hosted = HostedEngine(
                engine,
                precision,
                model=model,
                vocabulary_size=self._shape.vocab_size,
                threads=self._options.threads,
                logs=self._options.folder / "logs",
            )
            self._engines.append(hosted)
        try:
            _tell(f"{precision}: loading")
            self._in_turns(0, HostedEngine.wait_until_ready)
            yield
        finally:
            for hosted in self._engines:
                hosted.close()

    def _in_turns(self, first: int, do: Callable[[HostedEngine], None]) -> None:
        """Does something with each engine, from the given one on; those that fail are left out from then on."""
        start = first % max(1, len(self._engines))
        for engine in [*self._engines[start:], *self._engines[:start]]:
            try:
                do(engine)
            except EngineFailed as error:
                _tell(f"{error}: left out", stays=True)
                engine.close()
                self._engines.remove(engine)

    def _warm_up(self, engine: HostedEngine) -> None:
        """The first time of a shape is not measured: engines compile, pick kernels and allocate then."""
        for task in tasks(self._options.batches):
            _tell(f"warming up {engine.engine.name}: {task.kind} {task.batch} x {task.prompt}")
            engine.generate(batch=task.batch, prompt=task.prompt, tokens=min(4, task.tokens), seed=next(self._seed))

    def _compare_tokens(self, precision: str) -> None:
        """Says how far the engines agree: whoever computes another model is not to be compared with."""
        found: dict[str, list[int]] = {}

        def generate(engine: HostedEngine) -> None:
            _, sequences = engine.generate(batch=4, prompt=32, tokens=8, seed=0)
            found[engine.engine.name] = [*itertools.chain.from_iterable(sequences)]

        self._in_turns(0, generate)
        reference = "transformers" if "transformers" in found else next(iter(found), "")
        for name, ids in found.items():
            equal = sum(one == other for one, other in zip(ids, found[reference], strict=True))
            _tell(f"{precision}: {name} gives {equal} of {len(ids)} tokens that {reference} gives", stays=True)

    def _measure(self, engine: HostedEngine, task: Task, precision: str, number: int) -> Row:
        """The first quiet one of a few attempts, or the least disturbed one."""
        begin, attempts = time.perf_counter(), []
        for _ in range(ATTEMPTS):
            attempts.append(self._attempt(engine, task, precision, number))
            if attempts[-1].is_quiet or time.perf_counter() - begin > ATTEMPTS_SECONDS:
                break
        return min(attempts, key=lambda row: row.foreign)

    def _attempt(self, engine: HostedEngine, task: Task, precision: str, number: int) -> Row:
        time.sleep(SETTLE_SECONDS)
        far = self._bandwidth.measure()
        near = self._bandwidth.measure(int(step_bytes(self._shape, precision, task)))
        own = {*(each.pid for each in self._engines), *self._bandwidth.own_processes}
        with ForeignLoad(own) as foreign:
            first, seconds = self._timed(engine, task)
        return Row(
            model=self._options.model,
            precision=precision,
            engine=engine.engine.name,
            run=self._run,
            round=number,
            task=task,
            first_seconds=first,
            seconds=seconds,
            bandwidth=far,
            near_bandwidth=near,
            foreign=round(foreign.cores, 3),
        )

    def _timed(self, engine: HostedEngine, task: Task) -> tuple[float, float]:
        """Seconds for one token of output per prompt, the lesser of two, and for all of them."""

        def seconds(tokens: int) -> float:
            return engine.generate(batch=task.batch, prompt=task.prompt, tokens=tokens, seed=next(self._seed))[0]

        before = seconds(1)
        whole = seconds(task.tokens) if task.tokens > 1 else 0.0
        return min(before, seconds(1)), whole


def _tell(text: str, *, stays: bool = False) -> None:
    """Progress, on one line that the next one writes over unless it stays."""
    print(f"\r{text:<100}", end="\n" if stays else "", file=sys.stderr, flush=True)


def main() -> None:
    """Measures, then reports."""
    options = parse()
    rows = RowFile(options.folder / "engines.jsonl")
    if not options.report:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the engines end with this process
        try:
            Bench(options, rows).run()
        except KeyboardInterrupt:
            _tell("stopped: reporting what there is", stays=True)
        _tell("")
    report.make(rows, options)


if __name__ == "__main__":
    main()
