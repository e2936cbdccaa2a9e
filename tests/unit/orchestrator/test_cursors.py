"""Readers' cursors against logs, and what a generation lets a shard and a reader have."""

from __future__ import annotations

import pytest

from fermata.running_hash import hash_ids
from services.common.errors import CursorOutOfRange, InvalidRequest, LogDiverged, NeedFrom
from services.common.types import Cursor, FinishReason, SamplingProgram, StopRules, Tail
from services.orchestrator.cursors import match_cursors
from services.orchestrator.generation import Generation, GenerationName, GenerationSpec
from services.orchestrator.sequence import Sequence
from services.orchestrator.session_records import NewGeneration, random_ids

TABLE = [bytes([byte]) for byte in range(256)]
LOG = [10, 11, 12, 13]


def generation(choices: int = 1, *, committed: bool = False, detach: bool = False, max_tokens: int = 0) -> Generation:
    rules = StopRules(max_tokens=max_tokens)
    spec = GenerationSpec(SamplingProgram(), rules, choices=choices, committed=committed, detach=detach)
    sequences = [Sequence(choice, 2, spec.stop, table=TABLE, context_length=1000) for choice in range(choices)]
    name = GenerationName("t", *random_ids())
    record = NewGeneration(tenant="t", session=name.session, generation=name.generation, new_session=True)
    made = Generation(name, spec, record, [1, 2], sequences)
    for sequence in sequences:
        for token_id in LOG:
            sequence.append(token_id)
    return made


def cursor(count: int, ids: list[int], choice: int = 0) -> Cursor:
    return Cursor(choice, count, hash_ids(ids))


def test_a_cursor_within_the_log() -> None:
    assert match_cursors(generation(2), [cursor(2, LOG[:2], choice=1)], []).counts == [0, 2]
    assert match_cursors(generation(), [Cursor(0, 4)], []).counts == [4]
    assert match_cursors(generation(), [], []).counts == [0]


def test_other_tokens_are_found_by_their_hash() -> None:
    with pytest.raises(LogDiverged) as caught:
        match_cursors(generation(), [cursor(2, [10, 99])], [])
    assert caught.value.metadata == {"choice": "0", "count": "4"}


def test_a_log_that_is_shorter_asks_for_the_rest_and_takes_it() -> None:
    made, ids = generation(), [*LOG, 14, 15]
    with pytest.raises(NeedFrom) as caught:
        match_cursors(made, [cursor(6, ids)], [])
    assert caught.value.metadata == {"choice": "0", "count": "4"}
    matched = match_cursors(made, [cursor(6, ids)], [Tail(0, 4, [14, 15])])
    assert (matched.counts, matched.grown) == ([6], made.sequences)
    assert made.sequences[0].token_ids == ids


def test_a_tail_with_another_hash_changes_nothing() -> None:
    made, ids = generation(2), [*LOG, 14]
    good, bad = cursor(5, ids), Cursor(1, 5, bytes(8))
    tails = [Tail(0, 4, [14]), Tail(1, 4, [14])]
    with pytest.raises(LogDiverged):
        match_cursors(made, [good, bad], tails)
    assert [sequence.token_ids for sequence in made.sequences] == [LOG, LOG]


def test_a_tail_that_runs_past_the_end_changes_nothing() -> None:
    made, ids = generation(max_tokens=5), [*LOG, 14, 15]
    with pytest.raises(CursorOutOfRange):
        match_cursors(made, [cursor(6, ids)], [Tail(0, 4, [14, 15])])
    assert made.sequences[0].token_ids == LOG
    assert match_cursors(made, [cursor(5, ids[:5])], [Tail(0, 4, [14])]).counts == [5]
    assert made.sequences[0].ending is not None


def test_behind_the_end_there_is_nothing() -> None:
    made = generation()
    made.sequences[0].finish(FinishReason.CANCELLED)
    with pytest.raises(CursorOutOfRange):
        match_cursors(made, [cursor(5, [*LOG, 14])], [Tail(0, 4, [14])])


def test_a_choice_that_does_not_exist() -> None:
    with pytest.raises(InvalidRequest) as caught:
        match_cursors(generation(), [Cursor(3, 0)], [])
    assert caught.value.violations[0].field == "cursors[0].choice"


def test_grants_are_needed_at_half_of_the_window_while_somebody_reads() -> None:
    made = generation(detach=True)
    made.sequences[0].granted = 21
    made.sequences[0].append(1)
    assert not made.needs_grants(32)  # nothing runs that could use it
    made.attempts[0] = 9
    assert made.needs_grants(32)
    assert made.renewed_grants(32) == [(9, 5 + 32)]
    assert not made.needs_grants(32)
    assert made.renewed_grants(32) == []
    made.sequences[0].append(1)
    assert not made.needs_grants(32)
    assert made.renewed_grants(32) == [(9, 6 + 32)]  # along with that of another generation
    unread = generation()
    unread.attempts[0] = 9
    assert not unread.needs_grants(32)
    assert unread.renewed_grants(32) == []


def test_committed_readers_see_what_is_stored() -> None:
    for committed, visible in ((False, 4), (True, 3)):
        made = generation(committed=committed)
        sequence = made.sequences[0]
        sequence.durable_count = 3
        assert made.visible_count(sequence) == visible


def test_an_end_is_shown_once_it_is_stored_or_the_store_is_out_of_reach() -> None:
    for committed, shown_when_cut_off in ((False, True), (True, False)):
        made = generation(committed=committed)
        sequence = made.sequences[0]
        sequence.finish(FinishReason.CANCELLED)
        assert not made.shows_ending(sequence, cut_off=False)
        assert made.shows_ending(sequence, cut_off=True) == shown_when_cut_off
        sequence.durable_count, sequence.ending_stored = 4, True
        assert made.shows_ending(sequence, cut_off=False)
