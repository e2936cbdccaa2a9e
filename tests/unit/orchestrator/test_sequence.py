"""The log of one choice: ends, held bytes, hashes, restoring, tails."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fermata.running_hash import EMPTY_HASH, hash_ids
from services.common import failpoints
from services.common.types import FinishReason, StopRules
from services.common.vocabulary import IncrementalText
from services.orchestrator.sequence import Sequence

# Ids 0..255 are the single bytes, so that characters are cut in every way; 256 is a control token.
TABLE = [bytes([byte]) for byte in range(256)] + [b""]
CONTROL = 256


def sequence(rules: StopRules | None = None, *, position: int = 5, context_length: int = 1000) -> Sequence:
    return Sequence(0, position, rules or StopRules(), table=TABLE, context_length=context_length)


def feed(target: Sequence, text: str) -> None:
    for byte in text.encode():
        if target.ending is None:
            target.append(byte)


def read_text(source: Sequence, cuts: list[int]) -> str:
    """The text as a reader sees it whose messages end at `cuts`, the remainder included."""
    assert source.ending is not None
    first, parts = 0, []
    text = IncrementalText(source.pending(0))
    for cut in sorted({min(cut, source.count) for cut in cuts} | {source.count}):
        parts.append(text.extend(b"".join(TABLE[token] for token in source.token_ids[first:cut]), source.held(cut)))
        first = cut
    return "".join(parts) + text.finish(source.ending.cut_bytes)


def test_a_stop_token_ends_and_has_no_text() -> None:
    target = sequence(StopRules(token_ids=(CONTROL,)))
    feed(target, "hi")
    ending = target.append(CONTROL)
    assert ending is not None
    assert (ending.reason, ending.count, ending.stop_token_id) == (FinishReason.STOP_TOKEN, 3, CONTROL)
    assert read_text(target, []) == "hi"


def test_a_stop_token_with_text_is_cut_unless_it_is_wanted() -> None:
    for include, expected in ((False, "hi"), (True, "hi!")):
        target = sequence(StopRules(token_ids=(ord("!"),), include_stop_string=include))
        feed(target, "hi!")
        assert read_text(target, [1, 2]) == expected


def test_a_stop_string_is_cut_and_never_shown_in_part() -> None:
    for include, expected in ((False, "one "), (True, "one STOP")):
        target = sequence(StopRules(strings=("STOP",), include_stop_string=include))
        feed(target, "one STOP and more")
        assert target.ending is not None
        assert (target.ending.reason, target.ending.stop_string) == (FinishReason.STOP_STRING, "STOP")
        assert target.count == len("one STOP")
        assert read_text(target, list(range(20))) == expected


def test_limits() -> None:
    target = sequence(StopRules(max_tokens=3))
    feed(target, "abcdef")
    assert target.ending is not None
    assert (target.ending.reason, target.ending.count) == (FinishReason.MAX_TOKENS, 3)
    target = sequence(StopRules(max_tokens=30), position=7, context_length=10)
    feed(target, "abcdef")
    assert target.ending is not None
    assert (target.ending.reason, target.ending.count) == (FinishReason.CONTEXT_LENGTH, 3)


def test_stops_are_not_looked_for_before_min_tokens() -> None:
    target = sequence(StopRules(min_tokens=4, strings=("b",), token_ids=(ord("a"),), max_tokens=9))
    feed(target, "abab")
    assert target.ending is None
    feed(target, "b")
    assert target.ending is not None
    assert target.ending.reason is FinishReason.STOP_STRING


@given(st.text(max_size=30), st.lists(st.integers(1, 120), max_size=8), st.sampled_from([(), ("e",), ("ab", "\u00e9")]))
def test_text_does_not_depend_on_where_messages_were_cut(text: str, cuts: list[int], stops: tuple[str, ...]) -> None:
    target = sequence(StopRules(strings=stops))
    feed(target, text)
    if target.ending is None:
        target.finish(FinishReason.CANCELLED)
    found = min((index for stop in stops if (index := text.find(stop)) >= 0), default=None)
    assert read_text(target, cuts) == (text if found is None else text[:found])
    assert read_text(target, cuts) == read_text(target, [])


@given(st.text(min_size=1, max_size=20), st.integers(0, 60))
def test_a_reader_that_begins_at_a_cursor_sees_the_rest(text: str, cursor: int) -> None:
    target = sequence(StopRules(strings=("zz",)))
    feed(target, text)
    if target.ending is None:
        target.finish(FinishReason.CANCELLED)
    cursor = min(cursor, target.count)
    before = IncrementalText()
    shown = before.extend(b"".join(TABLE[token] for token in target.token_ids[:cursor]), target.held(cursor))
    after = IncrementalText(target.pending(cursor))
    rest = after.extend(b"".join(TABLE[token] for token in target.token_ids[cursor:]), target.held(target.count))
    assert target.ending is not None
    assert shown + rest + after.finish(target.ending.cut_bytes) == read_text(target, [])


def test_running_hashes() -> None:
    target = sequence()
    feed(target, "abc")
    assert target.running_hash(0) == EMPTY_HASH
    assert target.running_hash(2) == hash_ids(b"ab")
    assert target.running_hash(3) == hash_ids(b"abc")


def test_restoring_a_complete_log_finds_the_end_that_was_not_stored() -> None:
    target = sequence(StopRules(strings=("END",)))
    target.restore(list(b"the END"), None)
    assert target.ending is not None
    assert target.ending.reason is FinishReason.STOP_STRING
    assert not target.ending_stored
    assert target.durable_count == 7


def test_restoring_keeps_the_stored_end() -> None:
    first = sequence()
    feed(first, "abc")
    ending = first.finish(FinishReason.CANCELLED)
    target = sequence()
    target.restore(list(b"abc"), ending)
    assert target.ending == ending
    assert target.ending_stored


def test_tails_are_accepted_only_with_the_readers_hash() -> None:
    target = sequence()
    feed(target, "abc")
    wanted = hash_ids(b"abcde")
    assert target.accepts_tail(3, list(b"de"), 5, wanted) == list(b"de")
    assert target.accepts_tail(1, list(b"bcde"), 5, wanted) == list(b"de")
    assert target.accepts_tail(3, list(b"dx"), 5, wanted) is None
    assert target.accepts_tail(4, list(b"e"), 5, wanted) is None  # a gap
    assert target.accepts_tail(3, list(b"d"), 5, wanted) is None  # too short


def test_the_planted_bug_sees_a_stop_one_token_late(monkeypatch: pytest.MonkeyPatch) -> None:
    failpoints.configure({"FERMATA_PLANT": "stop_seen_late"}, testing=True)
    try:
        target = sequence(StopRules(strings=("b",)))
        feed(target, "abc")
        assert target.count == 3
    finally:
        failpoints.configure({}, testing=False)
