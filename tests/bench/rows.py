"""The file of measurements: JSON lines, one per run of the benchmark with what it ran on, and one per measurement.

Knows the file; computes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.bench.figures import Kind, Row, Task


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run of the benchmark ran on.

    Attributes:
        run: when it began.
        machine: in words.
        threads: of each engine.
        peak: billions of operations per second, by precision.
        versions: by engine.
    """

    run: str
    machine: str
    threads: int
    peak: dict[str, float]
    versions: dict[str, str] = field(default_factory=dict)

    def with_versions(self, versions: Mapping[str, str]) -> Run:
        """The same with the versions of these engines."""
        return replace(self, versions=dict(versions))


class RowFile:
    """A file that only grows. Of a run, the last line with an engine's version counts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, entry: Run | Row) -> None:
        """Writes one line."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps({type(entry).__name__.lower(): asdict(entry)}) + "\n")

    def runs(self) -> dict[str, Run]:
        """All runs by their beginning."""
        found: dict[str, Run] = {}
        for values in self._entries("run"):
            run = Run(**values)
            before = found.get(run.run, run)
            found[run.run] = run.with_versions(before.versions | run.versions)
        return found

    def rows(self) -> list[Row]:
        """All measurements."""
        rows = []
        for values in self._entries("row"):
            task = values.pop("task")
            rows.append(Row(task=Task(**{**task, "kind": Kind(task["kind"])}), **values))
        return rows

    def _entries(self, kind: str) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        lines = map(json.loads, self._path.read_text().splitlines())
        return [line[kind] for line in lines if kind in line]
