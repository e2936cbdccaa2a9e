"""The report of the engine benchmark, made of the rows alone: tables for the terminal and as Markdown, and a picture.

Knows what is shown; nothing of how it was measured.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.bench.charts import Panel, draw
from tests.bench.figures import QUIET, Kind, Row, Task, quiet_or_all, ratios, shares
from tests.bench.peers.registry import ENGINES, OURS
from tests.bench.peers.shapes import SHAPES
from tests.bench.rows import RowFile, Run

LEGEND = f"""\
Decode: batch x (128 - 1) / (T128 - T1) of 128 random prompt tokens each, greedy, end of text ignored; prefill: 1024 /
T1; first token: T1 of one prompt of 128. Medians over the rounds in which other processes used at most {QUIET} cores.
In brackets the share of the roofline in percent, by the bandwidth measured beside: of 512 MB / of a set as large as
what one step reads, some of which a large cache may hold.
`*`: no undisturbed round. `†`: not held against ours, because """


@dataclass(frozen=True)
class Table:
    """Cells of text; the first row is the head."""

    title: str
    rows: list[list[str]]

    def plain(self) -> str:
        """For a terminal: columns of equal width."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = []
        for row in self.rows:
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([self.title, *lines, ""])

    def markdown(self) -> str:
        """With pipes."""
        head, *body = ("| " + " | ".join(row) + " |" for row in self.rows)
        rule = "|---" + "|---:" * (len(self.rows[0]) - 1) + "|"
        return "\n".join([f"**{self.title}**", "", head, rule, *body, ""])


class Precision:
    """The rows of one model in one precision."""

    def __init__(self, model: str, precision: str, rows: Iterable[Row], runs: dict[str, Run]) -> None:
        self.model, self.name = model, precision
        self._rows = [row for row in rows if (row.model, row.precision) == (model, precision)]
        self._runs = runs
        self.engines = [name for name in ENGINES if any(row.engine == name for row in self._rows)]
        self.counted = [
            name for name in self.engines if name != OURS and precision not in dict(ENGINES[name].not_counted)
        ]

    def of(self, engine: str, task: Task) -> list[Row]:
        """Rows of an engine for a task, the quiet ones if there are some."""
        return quiet_or_all(row for row in self._rows if (row.engine, row.task) == (engine, task))

    def tasks(self) -> list[Task]:
        """What at least two engines did, or the only one, by size; prefill last."""
        done = {
            task: {row.engine for row in self._rows if row.task == task} for task in {row.task for row in self._rows}
        }
        most = max(map(len, done.values()), default=0)
        common = [task for task, engines in done.items() if len(engines) >= min(2, most)]
        return sorted(common, key=lambda task: (task.kind is Kind.PREFILL, task.batch, task.prompt))

    def rates(self) -> Table:
        """Tokens per second with the share of the roofline, engine by engine."""
        head = ["engine", *map(_title, self.tasks()), "first token, ms", "rounds"]
        return Table(f"{self.model}, {self.name}: tokens/s", [head, *map(self._rate_row, self.engines)])

    def ratios(self) -> Table | None:
        """This engine against each other one, medians over rounds; the last line is against the best of each round."""
        if OURS not in self.engines or not self.counted:
            return None
        names = [(name, [name]) for name in self.engines if name != OURS]
        head = [f"{OURS} divided by", *map(_title, self.tasks())]
        lines = [[name + self._mark(name), *(self._ratio(task, of) for task in self.tasks())] for name, of in names]
        lines.append(["the best of each round", *(self._ratio(task, self.counted) for task in self.tasks())])
        return Table(f"{self.model}, {self.name}: median ratio of the rounds", [head, *lines])

    def over_batch(self) -> Panel:
        """Tokens per second over the batch."""
        decode = [task for task in self.tasks() if task.kind is Kind.DECODE]
        series = {}
        for name in self.engines:
            points = [
                (task.batch, statistics.median(row.rate for row in found))
                for task in decode
                if (found := self.of(name, task))
            ]
            series[name] = points
        return Panel(f"{self.name}: decode, tokens/s over batch", series)

    def over_context(self) -> Panel | None:
        """Milliseconds for the next token over the context, of this engine, with its KV cache and without."""
        series = self._over_context()
        return Panel(f"{OURS}, {self.name}: ms for the next token over context", series) if series else None

    def over_context_table(self) -> Table | None:
        """The same in figures."""
        series = self._over_context()
        if not series:
            return None
        lengths = [length for length, _ in next(iter(series.values()))]
        rows = [[name, *(f"{milliseconds:.1f}" for _, milliseconds in points)] for name, points in series.items()]
        head = ["tokens of context", *(f"{length:.0f}" for length in lengths)]
        return Table(f"{self.model}, {self.name}: {OURS}, ms for the next token", [head, *rows])

    def _over_context(self) -> dict[str, list[tuple[float, float]]]:
        """(tokens of context, milliseconds) of both ways, at the lengths that both were measured at."""
        found: dict[Kind, dict[float, float]] = {Kind.DECODE: {}, Kind.PREFILL: {}}
        shortest = min((row.task.tokens for row in self._rows if row.task.kind is Kind.DECODE), default=0)
        for task in {row.task for row in self._rows if row.task.kind is Kind.PREFILL or row.task.tokens == shortest}:
            if task.batch == 1 and (rows := self.of(OURS, task)):
                found[task.kind][task.prompt] = 1e3 * statistics.median(row.step_seconds for row in rows)
        lengths = sorted(found[Kind.DECODE].keys() & found[Kind.PREFILL].keys())
        if len(lengths) < 2:
            return {}
        names = {"with KV cache": Kind.DECODE, "everything computed again": Kind.PREFILL}
        return {name: [(length, found[kind][length]) for length in lengths] for name, kind in names.items()}

    def _rate_row(self, engine: str) -> list[str]:
        cells = [self._rate(engine, task) for task in self.tasks()]
        single = [
            row
            for task in self.tasks()
            for row in self.of(engine, task)
            if task.batch == 1 and task.kind is Kind.DECODE
        ]
        first = f"{1e3 * statistics.median(row.first_seconds for row in single):.0f}" if single else ""
        rounds = len({(row.run, row.round) for row in self._rows if row.engine == engine})
        return [engine + self._mark(engine), *cells, first, str(rounds)]

    def _rate(self, engine: str, task: Task) -> str:
        rows = self.of(engine, task)
        if not rows:
            return ""
        far, near = shares(SHAPES[self.model], rows, peaks(self._runs))
        disturbed = "" if rows[0].is_quiet else "*"
        return f"{statistics.median(row.rate for row in rows):.0f}{disturbed} ({100 * far:.0f}/{100 * near:.0f})"

    def _ratio(self, task: Task, others: Sequence[str]) -> str:
        found = ratios((row for row in self._rows if row.task == task), OURS, others)
        return f"{statistics.median(found):.2f}" if found else ""

    def _mark(self, engine: str) -> str:
        return "†" if self.name in dict(ENGINES[engine].not_counted) else ""


def make(file: RowFile, options: argparse.Namespace) -> None:
    """Prints the tables; writes them and the picture beside the rows."""
    rows, runs = file.rows(), file.runs()
    parts = [Precision(options.model, precision, rows, runs) for precision in options.precisions]
    parts = [part for part in parts if part.engines]
    if not parts:
        print("there are no rows")
        return
    tables = [
        table
        for part in parts
        for table in (part.rates(), part.ratios(), part.over_context_table())
        if table is not None
    ]
    head = _head([row for row in rows if row.model == options.model], runs)
    reasons = [f"{name}: {why} ({precision})" for name in ENGINES for precision, why in ENGINES[name].not_counted]
    legend = LEGEND + "; ".join(reasons) + ".\n"
    print("\n".join([head, *(table.plain() for table in tables), legend]))
    text = "\n".join([head, *(table.markdown() for table in tables), legend])
    (options.folder / f"engines-{options.model}.md").write_text(text)
    panels = [part.over_batch() for part in parts]
    panels += [panel for part in parts if (panel := part.over_context()) is not None]
    (options.folder / f"engines-{options.model}.svg").write_text(draw(panels, emphasized=OURS))


def peaks(runs: dict[str, Run]) -> dict[str, float]:
    """The best of all runs, for a busy machine only takes away."""
    found: dict[str, float] = {}
    for run in runs.values():
        found |= {name: max(rate, found.get(name, 0.0)) for name, rate in run.peak.items()}
    return found


def _title(task: Task) -> str:
    if task.kind is Kind.PREFILL:
        return f"prefill {task.prompt}"
    return f"batch {task.batch}"


def _head(rows: Sequence[Row], runs: dict[str, Run]) -> str:
    """What it ran on, in a few lines."""
    used = [runs[name] for name in sorted({row.run for row in rows})]
    versions = {name: version for run in used for name, version in run.versions.items()}
    quiet = sum(row.is_quiet for row in rows)
    bandwidths = statistics.quantiles([row.bandwidth for row in rows], n=10) if len(rows) > 1 else [0.0]
    rates = ", ".join(f"{rate:.0f} {precision}" for precision, rate in peaks(runs).items())
    return (
        f"{used[-1].machine}; {used[-1].threads} threads each; {len(used)} runs, the last one at {used[-1].run}\n"
        f"memory read at {bandwidths[0]:.0f} to {bandwidths[-1]:.0f} GB/s (10 % to 90 % of the measurements);"
        f" peak in 10⁹ operations/s: {rates}; {quiet} of {len(rows)} measurements undisturbed\n"
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + "\n"
    )
