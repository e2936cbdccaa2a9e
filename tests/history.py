"""The history checker: what readers were sent, held against the rules of the stream.

A `History` is a list of records, one per thing that a reader saw, kept in memory and written as JSON lines when asked.
`check` returns every violation of the promises that the rules make; tests demand that there is none, and that each
planted bug makes at least one. Knows events and rules only: neither the library that read them nor the faults.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fermata.running_hash import hash_ids


@dataclass(frozen=True, slots=True)
class Output:
    """One whole choice: of the undisturbed run, or of a log."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Record:
    """One thing that a reader saw.

    Attributes:
        reader: a name; a reader that resumed by itself keeps its name.
        generation: the generation_id, empty before `started`.
        kind: opened (from cursor `first_offset`), started, tokens, finished, failed; or, with the owner as `reader`
            and its epoch as `count`, claimed, and appended when the session store acknowledged tokens.
        choice, first_offset, token_ids, text, running_hash (hex), durable_count, finish_reason, count: of the event.
        detail: of an error.
    """

    reader: str
    generation: str
    kind: str
    choice: int = 0
    first_offset: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    running_hash: str = ""
    durable_count: int = 0
    finish_reason: str = ""
    count: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise (P1-P13) or rule (R1-R25), with what shows it."""

    rule: str
    detail: str


@dataclass
class History:
    """What all readers of a run saw, in the order in which it was noted."""

    records: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Notes one thing."""
        self.records.append(record)

    def write(self, path: Path) -> None:
        """Writes JSON lines."""
        path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in self.records))


_OF_OWNERS = ("claimed", "appended")
_Seen = dict[tuple[str, int], dict[int, int]]
"""What was delivered: by generation and choice, the id at each offset."""
_Ends = dict[tuple[str, int], Record]
"""The first end that was seen, by generation and choice."""


def check(history: History, references: dict[str, dict[int, Output]] | None = None) -> list[Violation]:
    """All violations in a history.

    Args:
        history: of one or more generations.
        references: by generation and choice, the undisturbed run; a generation that is not named is only held
            against itself.
    """
    violations: list[Violation] = []
    seen: _Seen = defaultdict(dict)
    ends: _Ends = {}
    readers: dict[str, _ReaderCheck] = {}
    for record in history.records:
        if record.kind in _OF_OWNERS:
            continue
        readers.setdefault(record.reader, _ReaderCheck(seen, ends)).take(record)
    for reader in readers.values():
        violations += reader.violations
    violations += _check_owners(history.records)
    for generation, choices in (references or {}).items():
        for choice, reference in choices.items():
            violations += _check_reference(generation, choice, reference, seen, ends)
    return violations


class _ReaderCheck:
    """One reader of one generation: order, gaps, repeats, hashes, ends; and agreement with what others saw."""

    def __init__(self, seen: _Seen, ends: _Ends) -> None:
        self.violations: list[Violation] = []
        self._seen, self._ends = seen, ends
        # Where the reader began, and what it has since, by choice. A later reader may begin in the middle.
        self._base: dict[int, int] = defaultdict(int)
        self._had: dict[int, list[int]] = defaultdict(list)
        self._durable: dict[int, int] = defaultdict(int)
        self._finished: set[int] = set()

    def take(self, record: Record) -> None:
        """Checks the next record of the reader."""
        if record.kind == "opened":
            self._base[record.choice] = record.first_offset
        elif record.kind == "failed":
            self._violate("P1", record, f"failed: {record.detail}")
        elif record.kind == "tokens":
            self._take_tokens(record)
        elif record.kind == "finished":
            self._take_finished(record)

    def _violate(self, rule: str, record: Record, detail: str) -> None:
        where = f"{record.reader}, choice {record.choice}, offset {record.first_offset}"
        self.violations.append(Violation(rule, f"{where}: {detail}"))

    def _count(self, choice: int) -> int:
        return self._base[choice] + len(self._had[choice])

    def _take_tokens(self, record: Record) -> None:
        choice, ids = record.choice, self._had[record.choice]
        if choice in self._finished:
            self._violate("P7", record, "tokens after the end")
        if record.first_offset != self._count(choice):
            self._violate("P1", record, f"expected offset {self._count(choice)}")
        ids.extend(record.token_ids)
        delivered = self._seen[record.generation, choice]
        for offset, token_id in enumerate(record.token_ids, record.first_offset):
            if delivered.setdefault(offset, token_id) != token_id:
                self._violate("P2", record, f"{token_id} where {delivered[offset]} was delivered")
        if record.running_hash and self._base[choice] == 0 and hash_ids(ids).hex() != record.running_hash:
            self._violate("R16", record, "the running hash is not that of the tokens")
        if record.durable_count < self._durable[choice]:
            self._violate("R4", record, f"durable_count fell to {record.durable_count}")
        self._durable[choice] = record.durable_count

    def _take_finished(self, record: Record) -> None:
        if record.choice in self._finished:
            self._violate("P7", record, "a second end")
        self._finished.add(record.choice)
        if record.count != self._count(record.choice):
            self._violate("P1", record, f"ended at {record.count}, has {self._count(record.choice)}")
        first = self._ends.setdefault((record.generation, record.choice), record)
        if (first.finish_reason, first.count) != (record.finish_reason, record.count):
            self._violate("P7", record, f"ended {record.finish_reason}, others {first.finish_reason}")


def _check_reference(
    generation: str,
    choice: int,
    reference: Output,
    seen: _Seen,
    ends: _Ends,
) -> list[Violation]:
    """P3: the whole is the undisturbed run, and it came to an end."""
    violations = []
    delivered = seen[generation, choice]
    wrong = [offset for offset, token_id in delivered.items() if _at(reference.token_ids, offset) != token_id]
    if wrong:
        violations.append(
            Violation("P3", f"choice {choice}: other tokens than undisturbed at offsets {sorted(wrong)[:5]}")
        )
    if len(delivered) != len(reference.token_ids):
        violations.append(
            Violation("P3", f"choice {choice}: {len(delivered)} tokens, undisturbed {len(reference.token_ids)}")
        )
    end = ends.get((generation, choice))
    if end is None:
        violations.append(Violation("P7", f"choice {choice}: never ended"))
    elif end.finish_reason != reference.finish_reason:
        violations.append(
            Violation("P3", f"choice {choice}: ended {end.finish_reason}, undisturbed {reference.finish_reason}")
        )
    return violations


def _check_owners(records: Iterable[Record]) -> list[Violation]:
    """P5: once an owner has claimed or appended, no earlier one ever appends."""
    violations = []
    latest: dict[str, Record] = {}
    for record in records:
        if record.kind in _OF_OWNERS:
            newest = latest.setdefault(record.generation, record)
            if record.count < newest.count:
                detail = f"{record.reader} appended in epoch {record.count}, after {newest.reader} in {newest.count}"
                violations.append(Violation("P5", detail))
            elif record.count > newest.count:
                latest[record.generation] = record
    return violations


def check_text(history: History, references: dict[str, dict[int, Output]]) -> list[Violation]:
    """R2: for readers that began at the start, all texts concatenate to the undisturbed one."""
    texts: dict[tuple[str, str, int], str] = defaultdict(str)
    partial: set[tuple[str, int]] = set()
    done: set[tuple[str, str, int]] = set()
    for record in history.records:
        if record.kind == "opened" and record.first_offset:
            partial.add((record.reader, record.choice))
        texts[record.reader, record.generation, record.choice] += record.text
        if record.kind == "finished":
            done.add((record.reader, record.generation, record.choice))
    return [
        Violation("R2", f"{reader}, choice {choice}: {texts[reader, generation, choice]!r} is not the text")
        for reader, generation, choice in sorted(done)
        if (reader, choice) not in partial
        and generation in references
        and texts[reader, generation, choice] != references[generation][choice].text
    ]


def _at(items: Iterable[int], offset: int) -> int | None:
    return next(itertools.islice(items, offset, None), None)
