"""The checker itself: it must be silent on a right history and find each kind of wrong one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fermata.running_hash import hash_ids
from tests.history import History, Output, Record, check, check_text

IDS = (5, 6, 7, 8)
REFERENCE = {"g": {0: Output(IDS, "abcd", "STOP_TOKEN")}}


def tokens(first: int, *ids: int, reader: str = "r", text: str = "") -> Record:
    running_hash = hash_ids((*IDS[:first], *ids)).hex()
    return Record(reader, "g", "tokens", 0, first, ids, text, running_hash, durable_count=first)


def finished(count: int = 4, reader: str = "r", reason: str = "STOP_TOKEN") -> Record:
    return Record(reader, "g", "finished", count=count, finish_reason=reason)


RIGHT = [tokens(0, 5, 6, text="ab"), tokens(2, 7, 8, text="cd"), finished()]


def test_a_right_history_has_no_violation() -> None:
    history = History([*RIGHT, tokens(0, *IDS, reader="other", text="abcd"), finished(reader="other")])
    assert check(history, REFERENCE) == []
    assert check_text(history, REFERENCE) == []


def test_a_reader_may_begin_at_a_cursor() -> None:
    opened = Record("r", "g", "opened", 0, 2)
    assert check(History([tokens(0, 5, 6, reader="a"), opened, tokens(2, 7, 8), finished()]), REFERENCE) == []


@pytest.mark.parametrize(
    ("rule", "records"),
    [
        ("P1", [tokens(0, 5, 6), replace(tokens(2, 7, 8), first_offset=3), finished()]),  # a gap
        ("P1", [tokens(0, 5, 6), tokens(1, 6, 7), finished()]),  # twice
        ("P1", [*RIGHT[:2], finished(3)]),
        ("P1", [*RIGHT, Record("x", "g", "failed", detail="UNAVAILABLE")]),
        ("P2", [*RIGHT, tokens(0, 5, 9, reader="other")]),
        ("P3", [tokens(0, 5, 6), tokens(2, 7, 9), finished()]),
        ("P3", [tokens(0, 5, 6), tokens(2, 7), finished(3)]),
        ("P3", [*RIGHT[:2], finished(reason="MAX_TOKENS")]),
        ("P7", RIGHT[:2]),
        ("P7", [*RIGHT, finished()]),
        ("P7", [*RIGHT, finished(reader="other", count=0, reason="CANCELLED")]),
        ("P5", [*RIGHT, Record("b", "g", "appended", count=2), Record("a", "g", "appended", count=1)]),
        ("R16", [replace(tokens(0, *IDS), running_hash="00" * 8), finished()]),
        ("R4", [tokens(0, 5, 6), replace(tokens(2, 7), durable_count=2), replace(tokens(3, 8), durable_count=1)]),
    ],
)
def test_each_kind_of_wrong_history_is_found(rule: str, records: list[Record]) -> None:
    assert rule in {violation.rule for violation in check(History(records), REFERENCE)}


def test_a_wrong_text_is_found() -> None:
    history = History([tokens(0, *IDS, text="abc"), replace(finished(), text="x")])
    assert [violation.rule for violation in check_text(history, REFERENCE)] == ["R2"]
