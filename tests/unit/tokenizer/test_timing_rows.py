"""Many tokens at once have the parts that `timings.between` says of each two."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as some

from services.common.timings import CallMoments, Parts, StepMoments, TokenMoments, Told, between, first
from services.common.tracing import new_trace, step_context
from services.tokenizer.decode_record import DecodeRecord
from services.tokenizer.timing_rows import NotedMoments, Occasion, delivery_of, note, parts_between, rows_of

MOMENTS = some.integers(min_value=0, max_value=2**50)
steps = some.builds(StepMoments, some.sampled_from(("one", "other")), *[MOMENTS] * 8)
noted = some.builds(TokenMoments, some.none() | steps, some.integers(1, 2), *[MOMENTS] * 3, some.none()).map(note)
occasions = some.tuples(some.lists(noted, min_size=1, max_size=3), MOMENTS, MOMENTS, MOMENTS, MOMENTS, MOMENTS)


def told(some_occasions: list[Occasion]) -> list[Told]:
    return [Told(each.moments, delivery_of(each, occasion)) for occasion in some_occasions for each in occasion[0]]


@given(some.lists(occasions, min_size=1, max_size=6))
def test_the_parts_are_those_of_each_two(drawn: list[Occasion]) -> None:
    tokens = told(drawn)
    found = [Parts(*row) for row in parts_between(rows_of(drawn)).tolist()]
    assert found == [between(last, token) for last, token in pairwise(tokens)]


@given(some.lists(occasions, min_size=2, max_size=6), some.integers(1, 5))
def test_it_does_not_matter_when_they_are_worked_out(drawn: list[Occasion], cut: int) -> None:
    call, tokens = CallMoments(5, 1, 1, 9), told(drawn)
    record = DecodeRecord(0, 0, call)
    record.waiting.append(([], 0, 0, 0, 0, 0))  # of an orchestrator that tells nothing
    found = []
    for occasion in (drawn[:cut], drawn[cut:]):
        record.waiting.extend(occasion)
        found += [Parts(*row) for row in record.settle().tolist()]
    wanted = [first(tokens[0], call), *(between(last, token) for last, token in pairwise(tokens))]
    assert found == wanted
    assert record.count == len(tokens)
    assert record.first_ns == tokens[0].delivery.departed


def at(millisecond: int, number: int) -> tuple[list[NotedMoments], int, int, int, int, int]:
    """A token that leaves at a millisecond, drawn by a step."""
    moment = millisecond * 1_000_000
    step = StepMoments("shard", number, *[moment] * 7)
    return [note(TokenMoments(step, 1, moment, moment, moment))], moment, moment, moment, 0, 0


def test_spans_follow_one_another() -> None:
    record = DecodeRecord(2, 10, CallMoments(1_000_000, 0, 0, 0))
    parent = new_trace(sampled=True)
    record.waiting += [at(3, 7), at(5, 8)]
    record.settle()
    span = record.span("g", parent, None)
    assert (span.parent_id, span.context.trace_id) == (parent.span_id, parent.trace_id)
    assert span.end_ns - span.start_ns == 4_000_000
    packed = {name.removeprefix("fermata."): value for name, value in span.attributes.items()}
    assert (packed["choice"], packed["token.first_offset"], packed["shards"]) == (2, 10, ["shard"])
    assert list(packed["token.departed_us"]) == [2000, 4000]  # type: ignore[arg-type]
    tokens = list(record.token_spans(span))
    assert [token.attributes["fermata.token.offset"] for token in tokens] == [10, 11]
    assert [token.links for token in tokens] == [(step_context("shard", 7),), (step_context("shard", 8),)]
    assert tokens[0].end_ns - tokens[1].start_ns < 1_000_000
    record.clear()
    record.waiting.append(at(9, 9))
    record.settle()
    later = record.span("g", parent, None)
    assert later.attributes["fermata.token.first_offset"] == 12
    assert later.end_ns - later.start_ns == 4_000_000
