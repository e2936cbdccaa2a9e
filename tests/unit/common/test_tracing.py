"""Contexts as the standard writes them, ids that have an address, and a memory with a bound."""

from __future__ import annotations

from array import array

import pytest

from services.common.tracing import (
    Recorder,
    Span,
    TraceContext,
    is_chosen,
    new_trace,
    packed,
    parse_traceparent,
    span_id,
    step_context,
    unpack,
)

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_header_comes_back() -> None:
    context = parse_traceparent(f"00-{TRACE}-{SPAN}-01")
    assert context is not None
    assert (context.trace_id.hex(), context.span_id.hex(), context.sampled) == (TRACE, SPAN, True)
    assert context.traceparent == f"00-{TRACE}-{SPAN}-01"
    assert unpack(context.pack()) == context
    assert parse_traceparent(f"cc-{TRACE}-{SPAN}-00-what-a-later-version-adds") is not None


@pytest.mark.parametrize(
    "header",
    ["", "00", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}-{SPAN}"],
)
def test_what_is_no_context_is_none(header: str) -> None:
    assert parse_traceparent(header) is None
    assert unpack(header.encode()) is None


def test_an_address_has_one_id() -> None:
    assert span_id("g", "own", 3) == span_id("g", "own", 3) != span_id("g", "own", 4)
    assert step_context("shard", 1) == step_context("shard", 1) != step_context("shard", 2)
    root = new_trace(sampled=True)
    assert root.child().trace_id == root.trace_id
    assert root.child() != root.child()
    assert not new_trace(sampled=False).sampled


def test_about_the_wanted_share_is_chosen_by_everybody_alike() -> None:
    contexts = [TraceContext(span_id(number) * 2, bytes(8), 1) for number in range(4000)]
    assert 0.08 < sum(is_chosen(context, 0.1) for context in contexts) / 4000 < 0.12
    assert not any(is_chosen(context, 0) for context in contexts)
    assert all(is_chosen(context, 1) for context in contexts)


def test_numbers_are_packed_as_json() -> None:
    assert packed(array("q", [1, -2, 3])) == "[1, -2, 3]"


def span(name: str, numbers: int = 0) -> Span:
    return Span(name, new_trace(sampled=False), b"", 0, 1, attributes={"n": array("q", range(numbers))})


def test_the_recorder_forgets_who_was_longest_without_a_span() -> None:
    recorder = Recorder(5 * span("any").weight)
    for name in "abcd":
        recorder.record(name, span(name))
    recorder.record("a", span("again"))
    recorder.record("e", span("e"))
    assert recorder.spans("b") == []
    assert [item.name for item in recorder.spans("a")] == ["a", "again"]
    assert recorder.weight == sum(item.weight for name in "acde" for item in recorder.spans(name))
    recorder.record("huge", span("huge", 10_000))
    assert recorder.weight == 0
