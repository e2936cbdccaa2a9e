"""Sessions as trees: id sequences of any generation."""

from __future__ import annotations

import pytest

from services.common.errors import GenerationNotFound, LogLost
from services.orchestrator.session_records import BranchPoint, GenerationRecord
from services.orchestrator.session_tree import context_after, context_before, path_from_root


def record(name: str, parent: BranchPoint, prompt: list[int], *logs: list[int]) -> GenerationRecord:
    return GenerationRecord("s", name, parent, prompt, b"", b"", len(logs), 0, b"", 0, 0, False, {}, list(logs))


RECORDS = {
    item.generation: item
    for item in (
        record("a", BranchPoint(), [1, 2], [10, 11, 12], [20, 21]),
        record("b", BranchPoint("a", 0, 3), [3], [30, 31]),
        record("c", BranchPoint("a", 1, 1), [4], [40]),
        record("d", BranchPoint("b", 0, 1), [5], [50]),
        record("e", BranchPoint("missing", 0, 1), [5], [50]),
    )
}


def test_contexts() -> None:
    assert context_before(path_from_root(RECORDS, "a")) == [1, 2]
    assert context_before(path_from_root(RECORDS, "b")) == [1, 2, 10, 11, 12, 3]
    assert context_before(path_from_root(RECORDS, "c")) == [1, 2, 20, 4]
    path = path_from_root(RECORDS, "d")
    assert [item.generation for item in path] == ["a", "b", "d"]
    assert context_after(path, 0) == [1, 2, 10, 11, 12, 3, 30, 5, 50]
    assert context_after(path_from_root(RECORDS, "a"), 1, 1) == [1, 2, 20]


def test_what_is_missing() -> None:
    with pytest.raises(GenerationNotFound):
        path_from_root(RECORDS, "x")
    with pytest.raises(LogLost):
        path_from_root(RECORDS, "e")
