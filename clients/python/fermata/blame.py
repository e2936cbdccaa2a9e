"""Judges a trace: which tokens were slow, which part of their time is to blame, and why, in words to act on.

Pure. A token is compared with what is usual for its choice: the median of the tokens that no call began with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from fermata.parts import PARTS, duration, percent
from fermata.trace import Step, Trace, TracedToken

SLOW_FACTOR, SLOW_MARGIN = 3, 5_000
"""A token is slow when it took this many times the usual, and this many microseconds more than it."""

CLOCK_SLACK_NS = 50_000_000
"""How far the clocks of two machines may be apart for what happened on them to be taken as one event."""

CROWDED = 1.5
"""How many times the usual number of sequences a step has when that is why it was slow."""

_REASONS: Mapping[str, str] = {
    "open": "the tokenizer took long before it asked an orchestrator",
    "render": "the tokenizer took long to render the conversation",
    "encode": "the tokenizer took long to turn the prompt into ids",
    "claim": "the session store was slow",
    "place": "the orchestrator took long to find a shard",
    "admission": "the shard was busy with others' steps, or had no room in its KV cache",
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
    "unaccounted": "no place knows; its step is not known, as for tokens that are read from the session store",
}
_MOVED = ("wait", "publish", "shard_hop", "relay", "hop", "unaccounted")
"""Parts that may grow when another process takes over."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A part over some tokens.

    Attributes:
        mean, median, high: microseconds per token; the last is the 99th percentile.
        share: of the time of all tokens.
    """

    mean: float
    median: float
    high: int
    share: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a token took as long as it did.

    Attributes:
        token: it.
        part: the part to blame: that with the greatest excess over its median; of a call's first token, the greatest.
        excess: microseconds that this part has above its median; of a call's first token, all of it.
        share: of the token's excess over the median interval that this part explains; of a call's first token, of all
            its time. More than 1 when other parts made up for some of it.
        reason: what happened, as a sentence without capital and full stop.
    """

    token: TracedToken
    part: str
    excess: float
    share: float
    reason: str

    def sentence(self, *, with_choice: bool = False) -> str:
        """All of it in one sentence."""
        token = self.token
        name = f"token {token.offset}" + (f" of choice {token.choice}" if with_choice else "")
        shown = duration(token.parts.get(self.part, 0))
        of = "" if token.opens_call else " of the excess"
        blamed = f"{shown} of it {PARTS[self.part].title} ({percent(min(self.share, 1))}{of})"
        return f"{name}: {duration(token.interval)}, {blamed}: {self.reason}"


def quantile(values: Sequence[int], share: float) -> int:
    """The value that this share of some values does not exceed; 0 of none."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else 0


def between_tokens(tokens: Sequence[TracedToken]) -> list[TracedToken]:
    """Those whose interval is the time since the token before: all but the first of each call."""
    return [token for token in tokens if not token.opens_call]


def usual_interval(tokens: Sequence[TracedToken]) -> float:
    """The median interval of a choice's tokens, in microseconds; 0 where there is none."""
    return median([token.interval for token in between_tokens(tokens)] or [0])


def slow_above(tokens: Sequence[TracedToken]) -> float:
    """The interval in microseconds above which a token of a choice is slow."""
    usual = usual_interval(tokens)
    return max(SLOW_FACTOR * usual, usual + SLOW_MARGIN)


def summaries(tokens: Sequence[TracedToken]) -> dict[str, Summary]:
    """Each part over some tokens, in the order of the parts, without those that none of them has."""
    whole = sum(token.interval for token in tokens) or 1
    found = {}
    for part in PARTS:
        values = [token.parts.get(part, 0) for token in tokens]
        if any(values):
            found[part] = Summary(fmean(values), median(values), quantile(values, 0.99), sum(values) / whole)
    return found


def outliers(trace: Trace) -> list[Verdict]:
    """The slow tokens of all choices, the slowest first.

    The first token of a choice is not among them: it takes longer than the others by its nature.
    """
    slow = [
        token
        for tokens in trace.choices.values()
        for limit in [slow_above(tokens)]
        for token in tokens
        if token.offset and token.interval > limit
    ]
    slow.sort(key=lambda token: -token.interval)
    usual = {choice: _usual(trace, tokens) for choice, tokens in trace.choices.items()} if slow else {}
    return [_verdict(trace, token, usual[token.choice]) for token in slow]


def judge(trace: Trace, token: TracedToken) -> Verdict:
    """Says why a token of the trace took as long as it did."""
    return _verdict(trace, token, _usual(trace, trace.choices[token.choice]))


class _Usual(NamedTuple):
    """Medians over a choice: intervals and parts in microseconds, sequences in a step."""

    interval: float
    parts: Mapping[str, float]
    batch: float


def _usual(trace: Trace, tokens: Sequence[TracedToken]) -> _Usual:
    known = between_tokens(tokens)
    parts = {part: median([token.parts.get(part, 0) for token in known] or [0]) for part in PARTS}
    batches = [len(step.batch) for token in tokens if (step := trace.step_of(token))]
    return _Usual(usual_interval(tokens), parts, median(batches or [0]))


def _verdict(trace: Trace, token: TracedToken, usual: _Usual) -> Verdict:
    # The first token of a call has parts that no other has: it is judged by itself.
    expected = {} if token.opens_call else usual.parts
    excesses = {part: value - expected.get(part, 0) for part, value in token.parts.items()}
    part = max(excesses, key=excesses.__getitem__, default="unaccounted")
    excess = excesses.get(part, 0)
    whole = token.interval - (0 if token.opens_call else usual.interval)
    reason = _reason(trace, token, part, usual.batch)
    return Verdict(token, part, excess, excess / whole if whole > 0 else 0.0, reason)


def _reason(trace: Trace, token: TracedToken, part: str, usual_batch: float) -> str:
    if part in _MOVED and (moved := _moved(trace, token)):
        return moved
    if part == "forward":
        return _why_forward(trace, token, usual_batch)
    if part == "wait":
        return _why_wait(trace, token)
    if part == "prefill":
        return _why_prefill(trace)
    if part == "unaccounted" and token.opens_call:
        return "a reader came back for it, and what was before is not known to this call"
    return _REASONS[part]


def _why_forward(trace: Trace, token: TracedToken, usual_batch: float) -> str:
    step = trace.step_of(token)
    if step is None:
        return "what else its step computed is no longer remembered"
    others = [(name, length) for name, length in step.batch if length > 1 and name != trace.generation_id]
    own = sum(length for name, length in step.batch if length > 1 and name == trace.generation_id)
    if own:
        return f"step {step.number} computed {own} tokens of its own prompt" + (
            f" and {sum(length for _, length in others)} of others" if others else ""
        )
    if others:
        others.sort(key=lambda mate: -mate[1])
        name, length = others[0]
        rest = sum(length for _, length in others[1:])
        return f"step {step.number} also computed {length} prompt tokens of {name}" + (
            f" and {rest} of {len(others) - 1} more" if rest else ""
        )
    if len(step.batch) > CROWDED * usual_batch:
        return f"step {step.number} decoded {len(step.batch)} sequences, where {usual_batch:.0f} are usual"
    return f"step {step.number} computed no prompt and no more sequences than usual: its machine was slow or busy"


def _why_wait(trace: Trace, token: TracedToken) -> str:
    before = next((item for item in trace.choices[token.choice] if item.offset == token.offset - 1), None)
    if before and before.step and token.step and before.shard == token.shard and token.step > before.step + 1:
        left_out = token.step - before.step - 1
        return f"the shard ran {left_out} step{'s' * (left_out > 1)} without it: no room in them, or no leave to go on"
    return "the shard was busy with something else or paused"


def _why_prefill(trace: Trace) -> str:
    if not trace.prompt_tokens:
        return "the prompt took several steps"
    cached = f", {trace.cached_tokens} of them from the KV cache," if trace.cached_tokens else ""
    return f"the prompt of {trace.prompt_tokens} tokens{cached} took several steps"


def _moved(trace: Trace, token: TracedToken) -> str:
    """That another process took over while the token was awaited; empty when nothing says so."""
    begin = token.departed_ns - 1000 * token.interval - CLOCK_SLACK_NS
    end = token.departed_ns + CLOCK_SLACK_NS
    opened = min((item.epoch for item in trace.activities if item.name == "own" and item.epoch), default=None)
    for later in trace.activities:
        if not begin <= later.start_ns <= end:
            continue
        if later.name == "resume":
            return "it had been parked, and an orchestrator took it up again"
        if later.name == "takeover" or (later.name == "own" and later.epoch != opened):
            return "another orchestrator took over"
    admissions = [item for item in trace.activities if item.name == "admission" and item.choice == token.choice]
    for later in admissions[1:]:
        if begin <= later.start_ns <= end:
            return f"it was admitted again, at shard {later.shard}"
    return ""


def batch_mates(trace: Trace, step: Step) -> list[tuple[str, int]]:
    """Whose sequences shared a step with the generation's own, those with most tokens first."""
    mates = list(step.batch)
    if (own := next((mate for mate in mates if mate[0] == trace.generation_id), None)) is not None:
        mates.remove(own)
    return sorted(mates, key=lambda mate: -mate[1])
