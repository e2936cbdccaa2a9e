"""A document becomes a trace: its tokens in order, once each, with their parts, steps and what was done around them."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from fermata import trace as names
from fermata.trace import Trace, read_trace
from services.common import attributes, otlp
from services.common.timings import CallMoments, StepMoments, TokenMoments
from services.common.tracing import new_trace
from services.tokenizer.decode_record import DecodeRecord
from services.tokenizer.timing_rows import note
from tests.unit.clients.trace_document import (
    FIRST,
    FIRST_STEP,
    GENERATION,
    MODEL,
    OTHERS,
    PLANTED,
    RESUMED,
    SHARDS,
    START,
    Plan,
    merged,
    trace_document,
)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(trace_document())


def test_names_are_those_that_the_services_write() -> None:
    same = {
        "OPERATION": attributes.OPERATION_NAME,
        "MODEL": attributes.REQUEST_MODEL,
        "RESPONSE_ID": attributes.RESPONSE_ID,
        "FINISH_REASONS": attributes.RESPONSE_FINISH_REASONS,
        "INPUT_TOKENS": attributes.USAGE_INPUT_TOKENS,
        "CACHE_READ_TOKENS": attributes.USAGE_CACHE_READ_TOKENS,
        "GENERATION": attributes.GENERATION_ID,
        "CHOICE": attributes.CHOICE,
        "EPOCH": attributes.EPOCH,
        "SHARD": attributes.SHARD,
        "CACHED_TOKENS": attributes.CACHED_TOKENS,
        "FIRST_OFFSET": attributes.FIRST_OFFSET,
        "DEPARTED": attributes.TOKEN_DEPARTED,
        "TOKEN_STEP": attributes.TOKEN_STEP,
        "TOKEN_SHARD": attributes.TOKEN_SHARD,
        "SHARDS": attributes.SHARDS,
        "STEP_NUMBER": attributes.STEP_NUMBER,
        "STEP_TOKENS": attributes.STEP_TOKENS,
        "STEP_GENERATIONS": attributes.STEP_GENERATIONS,
        "STEP_LENGTHS": attributes.STEP_LENGTHS,
    }
    assert {name: getattr(names, name) for name in same} == same
    assert names.attribute_of("wait") == attributes.part("wait")


def test_the_whole(trace: Trace) -> None:
    assert (trace.generation_id, trace.operation, trace.model) == (GENERATION, "chat", MODEL)
    assert (trace.finish_reasons, trace.error) == (("stop",), "")
    assert (trace.prompt_tokens, trace.cached_tokens) == (700, 64)
    assert trace.start_ns == START
    assert trace.end_ns == trace.choices[0][-1].departed_ns + 40_000


def test_tokens(trace: Trace) -> None:
    tokens = trace.choices[0]
    assert [token.offset for token in tokens] == list(range(240))
    assert dict(tokens[0].parts) == FIRST
    assert tokens[0].departed_ns == START + 1000 * sum(FIRST.values())
    assert [token.opens_call for token in tokens] == [True] + [False] * 239
    for before, token in pairwise(tokens):
        assert sum(token.parts.values()) == token.interval
        assert token.departed_ns - before.departed_ns == 1000 * token.interval
        assert 0 not in token.parts.values()
    assert (tokens[0].step, tokens[0].shard) == (FIRST_STEP + 1, SHARDS[0])
    assert (tokens[171].step, tokens[171].shard) == (88, SHARDS[1])
    assert trace.tokens == list(tokens)


def test_spans_of_a_long_answer_are_joined(trace: Trace) -> None:
    assert read_trace(trace_document(Plan(per_span=50))).choices == trace.choices


def test_arrays_are_packed_or_not(trace: Trace) -> None:
    plain = read_trace(trace_document(Plan(packed=False)))
    assert (plain.choices, plain.steps) == (trace.choices, trace.steps)


def test_tokens_as_the_tokenizer_writes_them() -> None:
    record = DecodeRecord(1, 4, CallMoments(1_000, 0, 0, 0))
    step = StepMoments("9f2c1a", 12, 0, schedule=1_000_000, forward=2_000_000, sample=0, departed=0, sent=0, arrived=0)
    for clock, drawn, moment in ((1, step, 9_001_000), (2, None, 11_001_000)):
        noted = note(TokenMoments(drawn, clock, 0, 0, moment))
        record.waiting.append(([noted], moment, moment, moment, 0, 0))
    record.settle()
    process = otlp.resource("tokenizer", instance_id="t-0", node="here")
    document = otlp.write_document(process, [record.span(GENERATION, new_trace(sampled=True), None)])
    first, second = read_trace(document).choices[1]
    assert (first.offset, first.step, first.shard, first.opens_call) == (4, 12, "9f2c1a", True)
    assert dict(first.parts) == {"schedule": 1000, "forward": 2000, "publish": -3000, "unaccounted": 9000}
    assert first.interval == 9_000
    assert (second.offset, second.step, second.shard, second.opens_call) == (5, None, "", False)
    assert (dict(second.parts), second.departed_ns - first.departed_ns) == ({"unaccounted": 2_000}, 2_000_000)


def test_of_a_token_that_was_told_twice_the_first_reader_counts(trace: Trace) -> None:
    tokens = read_trace(trace_document(Plan(resumed_at=100))).choices[0]
    assert [token.offset for token in tokens] == list(range(240))
    assert tokens[:103] == trace.choices[0][:103]
    assert tokens[103].parts == trace.choices[0][103].parts
    assert tokens[103].departed_ns > trace.choices[0][103].departed_ns
    assert not any(token.opens_call for token in tokens[1:])


def test_the_first_token_of_a_reader_who_came_back_counts_from_the_call() -> None:
    tokens = read_trace(trace_document(Plan(resumed_at=100, told_twice=0))).choices[0]
    assert [token.offset for token in tokens if token.opens_call] == [0, 100]
    assert dict(tokens[100].parts) == RESUMED


def test_steps(trace: Trace) -> None:
    tokens = trace.choices[0]
    step = trace.step_of(tokens[57])
    assert step is not None
    assert (step.shard, step.number, step.tokens) == (SHARDS[0], tokens[57].step, 514)
    assert step.batch == ((GENERATION, 1), (OTHERS[0], 1), (OTHERS[1], PLANTED[57].prompt))
    assert (step.schedule, step.forward, step.sample) == tuple(
        tokens[57].parts[part] for part in ("schedule", "forward", "sample")
    )


def test_steps_of_old_tokens_may_be_forgotten() -> None:
    trace = read_trace(trace_document(Plan(forgotten=50)))
    tokens = trace.choices[0]
    assert trace.step_of(tokens[49]) is None
    assert trace.step_of(tokens[50]) is not None


def test_tokens_whose_steps_nobody_knows(trace: Trace) -> None:
    document = json.loads(trace_document())
    unknown = {attributes.TOKEN_STEP, attributes.TOKEN_SHARD, attributes.SHARDS}
    for of_process in document["resourceSpans"]:
        for span in of_process["scopeSpans"][0]["spans"]:
            span["attributes"] = [item for item in span["attributes"] if item["key"] not in unknown]
    tokens = read_trace(json.dumps(document)).choices[0]
    assert {(token.step, token.shard) for token in tokens} == {(None, "")}
    assert [token.parts for token in tokens] == [token.parts for token in trace.choices[0]]


def test_activities(trace: Trace) -> None:
    assert [activity.name for activity in trace.activities] == [
        *("call", "render", "encode", "open", "claim", "place", "own", "admission", "sequence"),
        *("waiting", "prefill", "decode", "takeover", "own", "admission", "sequence"),
    ]
    found = {activity.name: activity for activity in reversed(trace.activities)}
    arrived = found["sequence"].start_ns
    assert (found["waiting"].start_ns, found["waiting"].end_ns) == (arrived, arrived + 1000 * FIRST["admission"])
    drawn = sum(FIRST[part] for part in ("prefill", "schedule", "forward", "sample"))
    assert found["prefill"].end_ns - found["prefill"].start_ns == 1000 * drawn
    assert (found["decode"].start_ns, found["decode"].end_ns) == (
        trace.choices[0][0].departed_ns,
        trace.choices[0][-1].departed_ns,
    )
    admissions = [activity for activity in trace.activities if activity.name == "admission"]
    assert [(activity.choice, activity.shard, activity.error) for activity in admissions] == [
        (0, SHARDS[0], "UNAVAILABLE"),
        (0, SHARDS[1], ""),
    ]
    epochs = [activity.epoch for activity in trace.activities if activity.name == "own"]
    assert epochs[0] is not None
    assert epochs[1] == epochs[0] + 1
    assert {activity.place for activity in trace.activities} == {"tokenizer", "orchestrator", "shard"}


def test_several_choices() -> None:
    trace = read_trace(trace_document(Plan(choices=3, tokens=20)))
    assert {choice: len(tokens) for choice, tokens in trace.choices.items()} == {0: 20, 1: 20, 2: 20}
    assert trace.finish_reasons == ("stop",) * 3
    assert [activity.choice for activity in trace.activities if activity.name == "prefill"] == [0, 1, 2]
    assert len(trace.tokens) == 60


def test_a_request_that_failed_without_a_token() -> None:
    trace = read_trace(trace_document(Plan(tokens=0, error="OVERLOADED")))
    assert (trace.error, dict(trace.choices), trace.tokens) == ("OVERLOADED", {}, [])
    assert "decode" not in {activity.name for activity in trace.activities}


def test_a_generation_is_chosen_by_its_name(trace: Trace) -> None:
    """Also among those of one trace, such as the turns of a conversation that its program traces as one."""
    other = Plan(generation_id="other", tokens=5, forgotten=5)
    both = merged(trace_document(other), trace_document())
    assert len(read_trace(both, "other").tokens) == 5
    assert read_trace(both, GENERATION) == trace
    with pytest.raises(ValueError, match=f"^the document has 2 generations, name one: other, {GENERATION}$"):
        read_trace(both)


@pytest.mark.parametrize(
    ("document", "name", "complaint"),
    [
        (b'{"resourceSpans": []}', "", "the document has no generation"),
        (b'{"resourceSpans": []}', "x", "the document has no generation x"),
        (trace_document(Plan(tokens=1)), "x", "the document has no generation x"),
        (b"{}", "x", "this is not a document of spans in OTLP/JSON"),
    ],
)
def test_what_cannot_be_read(document: bytes, name: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{complaint}$"):
        read_trace(document, name)
