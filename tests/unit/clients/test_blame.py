"""Slow tokens are found, blamed on the right part, and explained by what the trace knows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fermata.blame import batch_mates, between_tokens, judge, outliers, quantile, slow_above, summaries
from fermata.parts import PARTS
from fermata.trace import Step, Trace, read_trace
from tests.unit.clients.trace_document import GENERATION, OTHERS, PLANTED, SHARDS, Plan, Slow, trace_document


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(trace_document())


def planted(offset: int, part: str, microseconds: int, **more: int) -> Trace:
    """A trace with one slow token."""
    return read_trace(trace_document(Plan(planted={offset: Slow(part, microseconds, **more)})))


def with_batch(trace: Trace, offset: int, *batch: tuple[str, int]) -> Trace:
    """The trace with others in the step of a token."""
    step = trace.step_of(trace.choices[0][offset])
    assert step is not None
    changed = replace(step, batch=((trace.generation_id, 1), *batch))
    return replace(trace, steps={**trace.steps, (step.shard, step.number): changed})


def test_planted_tokens_are_found_and_no_others(trace: Trace) -> None:
    verdicts = outliers(trace)
    assert {verdict.token.offset: verdict.part for verdict in verdicts} == {
        offset: slow.part for offset, slow in PLANTED.items()
    }
    intervals = [verdict.token.interval for verdict in verdicts]
    assert intervals == sorted(intervals, reverse=True)
    assert all(0.95 < verdict.share < 1.05 for verdict in verdicts)
    assert outliers(read_trace(trace_document(Plan(planted={})))) == []


REASONS = {
    "schedule": "the shard took long to choose a batch",
    "sample": "the shard took long to draw the tokens of its batch",
    "publish": "the shard took long to send its tokens",
    "shard_hop": "the way from the shard to the orchestrator was slow",
    "commit": "the session store was slow",
    "relay": "the orchestrator took long to send what readers may see",
    "hop": "the way from the orchestrator to the tokenizer was slow",
    "queue": "the tokenizer was slow: other tokens were before it",
    "detokenize": "the tokenizer was slow to turn ids into text",
    "write": "the reader took its events slowly",
    "wait": "the shard was busy with something else or paused",
    "unaccounted": "another orchestrator took over",
}


@pytest.mark.parametrize("part", REASONS)
def test_reasons(part: str) -> None:
    (verdict,) = outliers(planted(120, part, 70_000))
    assert (verdict.part, verdict.token.offset, verdict.reason) == (part, 120, REASONS[part])
    assert 69_000 < verdict.excess < 71_000


def test_a_sentence(trace: Trace) -> None:
    verdict = next(verdict for verdict in outliers(trace) if verdict.part == "forward")
    said = f"step {verdict.token.step} also computed 512 prompt tokens of {OTHERS[1]}"
    assert verdict.sentence() == f"token 57: 380.7 ms, 380.2 ms of it forward (100 % of the excess): {said}"
    assert verdict.sentence(with_choice=True).startswith("token 57 of choice 0: 380.7 ms")


def test_a_share_that_is_not_all() -> None:
    trace = planted(120, "commit", 30_000)
    tokens = list(trace.choices[0])
    parts = {**tokens[120].parts, "hop": 20_000}
    tokens[120] = replace(tokens[120], parts=parts, interval=sum(parts.values()))
    verdict = judge(replace(trace, choices={0: tokens}), tokens[120])
    assert verdict.part == "commit"
    assert verdict.sentence().startswith("token 120: 55.6 ms, 30.0 ms of it commit (60 % of the excess): ")


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ([("a", 300), ("b", 1)], "step {} also computed 300 prompt tokens of a"),
        ([("a", 100), ("b", 300), ("c", 50)], "step {} also computed 300 prompt tokens of b and 150 of 2 more"),
        ([(GENERATION, 64)], "step {} computed 64 tokens of its own prompt"),
        ([(GENERATION, 64), ("a", 8)], "step {} computed 64 tokens of its own prompt and 8 of others"),
        ([("a", 1)] * 30, "step {} decoded 31 sequences, where 2 are usual"),
        ([("a", 1)], "step {} computed no prompt and no more sequences than usual: its machine was slow or busy"),
    ],
)
def test_why_a_forward_pass_was_slow(batch: list[tuple[str, int]], reason: str) -> None:
    trace = with_batch(planted(120, "forward", 70_000), 120, *batch)
    (verdict,) = outliers(trace)
    assert verdict.reason == reason.format(verdict.token.step)


def test_a_step_that_is_forgotten() -> None:
    plan = Plan(planted={120: Slow("forward", 70_000)}, forgotten=200)
    (verdict,) = outliers(read_trace(trace_document(plan)))
    assert verdict.reason == "what else its step computed is no longer remembered"


@pytest.mark.parametrize(("left_out", "steps"), [(1, "1 step"), (3, "3 steps")])
def test_a_sequence_that_was_left_out(left_out: int, steps: str) -> None:
    (verdict,) = outliers(planted(120, "wait", 70_000, left_out=left_out))
    assert verdict.reason == f"the shard ran {steps} without it: no room in them, or no leave to go on"


def test_what_says_that_another_process_took_over(trace: Trace) -> None:
    def reason(*kept: str, renamed: str = "") -> str:
        activities = [
            replace(item, name=renamed) if renamed and item.name == "takeover" else item
            for item in trace.activities
            if item.name in kept
        ]
        return judge(replace(trace, activities=activities), trace.choices[0][171]).reason

    assert reason("takeover") == "another orchestrator took over"
    assert reason("own") == "another orchestrator took over"
    assert reason("takeover", renamed="resume") == "it had been parked, and an orchestrator took it up again"
    assert reason("admission") == f"it was admitted again, at shard {SHARDS[1]}"
    nothing = "no place knows; its step is not known, as for tokens that are read from the session store"
    assert reason() == nothing
    before = judge(trace, replace(trace.choices[0][100], parts={"unaccounted": 90_000}, interval=90_000))
    assert before.reason == nothing, "what happened at another time explains nothing"


def test_the_first_token(trace: Trace) -> None:
    verdict = judge(trace, trace.choices[0][0])
    assert (verdict.part, verdict.excess) == ("forward", 11_300)
    assert verdict.reason == f"step {verdict.token.step} computed 188 tokens of its own prompt"
    assert verdict.sentence().startswith("token 0: 32.0 ms, 11.3 ms of it forward (35 %): ")


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("open", "the tokenizer took long before it asked an orchestrator"),
        ("render", "the tokenizer took long to render the conversation"),
        ("encode", "the tokenizer took long to turn the prompt into ids"),
        ("claim", "the session store was slow"),
        ("place", "the orchestrator took long to find a shard"),
        ("admission", "the shard was busy with others' steps, or had no room in its KV cache"),
        ("prefill", "the prompt of 700 tokens, 64 of them from the KV cache, took several steps"),
    ],
)
def test_what_a_first_token_waited_for(part: str, reason: str) -> None:
    trace = planted(0, part, 90_000)
    assert judge(trace, trace.choices[0][0]).reason == reason
    assert outliers(trace) == [], "a first token is not compared with others"


def test_the_first_token_of_a_reader_who_came_back() -> None:
    trace = read_trace(trace_document(Plan(planted={}, resumed_at=100, told_twice=0)))
    token = trace.choices[0][100]
    assert judge(trace, token).reason == "a reader came back for it, and what was before is not known to this call"
    assert token not in between_tokens(trace.tokens)


def test_a_token_of_which_nothing_is_known(trace: Trace) -> None:
    verdict = judge(trace, replace(trace.choices[0][9], parts={}, interval=0))
    assert (verdict.part, verdict.excess, verdict.share) == ("unaccounted", 0, 0.0)


@pytest.mark.parametrize(("usual", "limit"), [(200, 5_200), (2_500, 7_500), (40_000, 120_000)])
def test_what_is_slow(trace: Trace, usual: int, limit: int) -> None:
    tokens = [replace(token, interval=usual) for token in trace.choices[0]]
    assert slow_above(tokens) == limit


def test_summaries(trace: Trace) -> None:
    found = summaries(between_tokens(trace.tokens))
    assert list(found) == [part for part in PARTS if part in found]
    assert not {"open", "prefill"} & set(found)
    assert sum(summary.share for summary in found.values()) == pytest.approx(1)
    assert found["forward"].median == pytest.approx(5_200, rel=0.02)
    assert found["commit"].high < PLANTED[31].microseconds, "one in 239 is beyond the 99th percentile"
    assert summaries([]) == {}


def test_quantiles() -> None:
    assert [quantile([5, 1, 4, 2, 3], share) for share in (0, 0.5, 0.99, 1)] == [1, 3, 5, 5]
    assert quantile([], 0.5) == 0


def test_batch_mates(trace: Trace) -> None:
    step = Step("s", 1, 9, ((GENERATION, 1), ("a", 1), (GENERATION, 4), ("b", 3)), 1, 1, 1)
    assert batch_mates(trace, step) == [(GENERATION, 4), ("b", 3), ("a", 1)]
    assert batch_mates(trace, replace(step, batch=(("a", 1),))) == [("a", 1)]
