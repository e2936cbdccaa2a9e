"""What is known of one generation, read from a trace document: its tokens, its steps, and what was done for it.

Pure. Knows the names of the spans and attributes that the services write; judges nothing and draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fermata.otlp import CLIENT_KIND, Span, read_spans
from fermata.parts import PARTS

OPERATION = "gen_ai.operation.name"
MODEL = "gen_ai.request.model"
RESPONSE_ID = "gen_ai.response.id"
FINISH_REASONS = "gen_ai.response.finish_reasons"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
CACHE_READ_TOKENS = "gen_ai.usage.cache_read.input_tokens"
GENERATION = "fermata.generation.id"
CHOICE = "fermata.choice"
EPOCH = "fermata.epoch"
SHARD = "fermata.shard"
CACHED_TOKENS = "fermata.cached_tokens"
FIRST_OFFSET = "fermata.token.first_offset"
DEPARTED = "fermata.token.departed_us"
TOKEN_STEP = "fermata.token.step"
TOKEN_SHARD = "fermata.token.shard"
SHARDS = "fermata.shards"
STEP_NUMBER = "fermata.step.number"
STEP_TOKENS = "fermata.step.tokens"
STEP_GENERATIONS = "fermata.step.generations"
STEP_LENGTHS = "fermata.step.lengths"

_SINGLE = ("render", "encode", "claim", "place", "own", "takeover", "resume", "admission", "sequence")
"""Spans that are shown as they are."""
_JOINT_NS = 1_000_000
"""How far the begin of a `decode` span may be from the last token of the one that it goes on."""
_UNTIL_DRAWN = ("prefill", "schedule", "forward", "sample")
"""Parts of a first token from the first step of its prompt to its draw."""


def attribute_of(part: str) -> str:
    """Name of the attribute of a `decode` span that has a part of each token's latency."""
    return f"fermata.token.{part}_us"


@dataclass(frozen=True, slots=True)
class TracedToken:
    """A token of a choice and where its time went.

    Attributes:
        choice, offset: which one.
        departed_ns: it left the tokenizer, in nanoseconds since the epoch on the tokenizer's clock.
        parts: microseconds by name, signed, without those that are zero. They sum to `interval`.
        interval: microseconds since the previous token of the choice left the tokenizer.
        step: number of the shard's step that drew it; None where it is not known.
        shard: process id of that shard; empty where it is not known.
        opens_call: it is the first that its call was told, so `interval` counts from the call's arrival.
    """

    choice: int
    offset: int
    departed_ns: int
    parts: Mapping[str, int]
    interval: int
    step: int | None
    shard: str
    opens_call: bool


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a shard.

    Attributes:
        shard, number: which one.
        tokens: computed in it, of all sequences.
        batch: whose sequences were in it, each with the tokens computed of it: 1 is a step of decoding, more is a
            part of a prompt.
        schedule, forward, sample: microseconds of its parts.
    """

    shard: str
    number: int
    tokens: int
    batch: tuple[tuple[str, int], ...]
    schedule: int
    forward: int
    sample: int


@dataclass(frozen=True, slots=True)
class Activity:
    """Something that was done for the generation as a whole or for one choice.

    Attributes:
        name: `call`, `open`, the name of a span, or `waiting`, `prefill` and `decode`, which are made of tokens' parts.
        place: tokenizer, orchestrator or shard.
        start_ns, end_ns: since the epoch, on the clock of its machine.
        choice: that it was done for; None when for all.
        epoch: of an ownership, a takeover or a resumption.
        shard: process id of the shard of an admission or a sequence.
        error: why it failed; empty when it did not.
    """

    name: str
    place: str
    start_ns: int
    end_ns: int
    choice: int | None = None
    epoch: int | None = None
    shard: str = ""
    error: str = ""


@dataclass(frozen=True)
class Trace:
    """One generation.

    Attributes:
        generation_id: its name.
        operation: chat or text_completion; empty where it is not known, as all that follows.
        model: its name.
        finish_reasons: why each choice ended.
        error: why the call that opened it failed; empty when it did not.
        prompt_tokens, cached_tokens: of the prompt, and how many of these were found in the KV cache.
        start_ns, end_ns: of all that is known, in nanoseconds since the epoch.
        choices: the tokens of each choice in order of offset; some may be missing.
        activities: in the order in which they began.
        steps: by shard and number; those of old tokens may be missing.
    """

    generation_id: str
    operation: str
    model: str
    finish_reasons: tuple[str, ...]
    error: str
    prompt_tokens: int | None
    cached_tokens: int | None
    start_ns: int
    end_ns: int
    choices: Mapping[int, Sequence[TracedToken]]
    activities: Sequence[Activity]
    steps: Mapping[tuple[str, int], Step] = field(repr=False)

    @cached_property
    def tokens(self) -> list[TracedToken]:
        """Those of all choices, one choice after the other."""
        return [token for tokens in self.choices.values() for token in tokens]

    def step_of(self, token: TracedToken) -> Step | None:
        """The step that drew a token, while it is remembered."""
        return None if token.step is None else self.steps.get((token.shard, token.step))


def read_trace(document: bytes | str, generation_id: str = "") -> Trace:
    """Reads a generation from a document; its only one, without a name.

    Raises:
        ValueError: it is no document, has no such generation, or several of which none is named.
    """
    spans = read_spans(document)
    found = {name: None for span in spans if (name := _named(span))}
    if not generation_id and len(found) > 1:
        raise ValueError(f"the document has {len(found)} generations, name one: {', '.join(found)}")
    if not found or generation_id not in ("", *found):
        raise ValueError(f"the document has no generation{generation_id and ' '}{generation_id}")
    name = generation_id or next(iter(found))
    return _trace(name, _spans_of(name, spans), _steps_of(name, spans))


def _named(span: Span) -> str:
    """The generation that a span itself names."""
    return span.text(GENERATION) or span.text(RESPONSE_ID)


def _spans_of(generation_id: str, spans: Sequence[Span]) -> list[Span]:
    """The spans of a generation in order of their begin: those of its traces that are not below another's."""
    by_id = {span.span_id: span for span in spans}

    def owner(span: Span | None) -> str:
        seen = set()
        while span is not None and span.span_id not in seen:
            if name := _named(span):
                return name
            seen.add(span.span_id)
            span = by_id.get(span.parent_id)
        return ""

    owners = {span.span_id: owner(span) for span in spans}
    traces = {span.trace_id for span in spans if owners[span.span_id] == generation_id}
    mine = [span for span in spans if span.trace_id in traces and owners[span.span_id] in ("", generation_id)]
    return sorted(mine, key=lambda span: span.start_ns)


def _steps_of(generation_id: str, spans: Iterable[Span]) -> dict[tuple[str, int], Step]:
    """The steps in which a generation's sequences were."""
    steps = {}
    for span in spans:
        generations = span.texts(STEP_GENERATIONS)
        if span.name == "step" and generation_id in generations:
            schedule, forward, sample = (span.integer(attribute_of(part)) or 0 for part in _UNTIL_DRAWN[1:])
            step = Step(
                shard=span.text(SHARD),
                number=span.integer(STEP_NUMBER) or 0,
                tokens=span.integer(STEP_TOKENS) or 0,
                batch=tuple(zip(generations, span.integers(STEP_LENGTHS), strict=False)),
                schedule=schedule,
                forward=forward,
                sample=sample,
            )
            steps[step.shard, step.number] = step
    return steps


def _trace(generation_id: str, spans: Sequence[Span], steps: Mapping[tuple[str, int], Step]) -> Trace:
    calls = [span for span in spans if span.text(OPERATION)]
    told = [span for span in calls if span.texts(FINISH_REASONS)]
    choices = _choices([span for span in spans if span.name == "decode"])
    departures = [token.departed_ns for tokens in choices.values() for token in tokens]
    cached = [span.integer(name) for name in (CACHE_READ_TOKENS, CACHED_TOKENS) for span in spans]
    return Trace(
        generation_id=generation_id,
        operation=calls[0].text(OPERATION) if calls else "",
        model=calls[0].text(MODEL) if calls else "",
        finish_reasons=told[-1].texts(FINISH_REASONS) if told else (),
        error=calls[0].error if calls else "",
        prompt_tokens=calls[0].integer(INPUT_TOKENS) if calls else None,
        cached_tokens=next((count for count in cached if count is not None), None),
        start_ns=min(span.start_ns for span in (calls or spans)),
        end_ns=max([*departures, *(span.end_ns for span in (calls or spans))]),
        choices=choices,
        activities=sorted(_activities(spans, choices), key=lambda activity: activity.start_ns),
        steps=steps,
    )


def _choices(decodes: Iterable[Span]) -> dict[int, tuple[TracedToken, ...]]:
    """The tokens of `decode` spans that are in order of their begin; of a token that was told twice, the first."""
    found: dict[int, dict[int, TracedToken]] = {}
    ends: dict[tuple[int, int], int] = {}
    for span in decodes:
        choice, offset = span.integer(CHOICE) or 0, span.integer(FIRST_OFFSET) or 0
        # One call's spans follow each other without a gap; a call that resumes begins when it arrives.
        goes_on = abs(ends.get((choice, offset), 0) - span.start_ns) < _JOINT_NS
        for token in _tokens(span, choice, offset, not goes_on):
            found.setdefault(choice, {}).setdefault(token.offset, token)
            ends[choice, token.offset + 1] = token.departed_ns
    return {choice: tuple(tokens[offset] for offset in sorted(tokens)) for choice, tokens in sorted(found.items())}


def _tokens(span: Span, choice: int, offset: int, opens_call: bool) -> Iterator[TracedToken]:
    """The tokens of one `decode` span, from an offset on."""
    shards, numbers, places = span.texts(SHARDS), span.integers(TOKEN_STEP), span.integers(TOKEN_SHARD)
    columns = {part: values for part in PARTS if (values := span.integers(attribute_of(part)))}
    for index, departed in enumerate(span.integers(DEPARTED)):
        parts = {part: values[index] for part, values in columns.items() if index < len(values) and values[index]}
        place = places[index] if index < len(places) else -1
        yield TracedToken(
            choice=choice,
            offset=offset + index,
            departed_ns=span.start_ns + departed * 1000,
            parts=parts,
            interval=sum(parts.values()),
            step=numbers[index] or None if index < len(numbers) else None,
            shard=shards[place] if 0 <= place < len(shards) else "",
            opens_call=opens_call and index == 0,
        )


def _activities(spans: Sequence[Span], choices: Mapping[int, Sequence[TracedToken]]) -> Iterator[Activity]:
    admitted: set[int] = set()
    for span in spans:
        name, choice = _activity_name(span), span.integer(CHOICE)
        if not name:
            continue
        yield Activity(
            name=name,
            place=span.service,
            start_ns=span.start_ns,
            end_ns=span.end_ns,
            choice=choice,
            epoch=span.integer(EPOCH),
            shard=span.text(SHARD),
            error=span.error,
        )
        if name == "sequence" and choice is not None and choice not in admitted:
            admitted.add(choice)
            yield from _before_the_draw(span, choice, choices.get(choice, ()))
    for choice, tokens in choices.items():
        yield Activity("decode", "tokenizer", tokens[0].departed_ns, tokens[-1].departed_ns, choice)


def _activity_name(span: Span) -> str:
    """What a span is shown as; empty when it is not."""
    if span.text(OPERATION):
        return "call"
    if span.kind == CLIENT_KIND and span.name.endswith("/Open"):
        return "open"
    return span.name if span.name in _SINGLE else ""


def _before_the_draw(sequence: Span, choice: int, tokens: Sequence[TracedToken]) -> Iterator[Activity]:
    """What a sequence did at its shard until its first token was drawn, from its arrival there on."""
    if not tokens or tokens[0].offset:
        return
    parts = tokens[0].parts
    begun = sequence.start_ns + 1000 * parts.get("admission", 0)
    drawn = begun + 1000 * sum(parts.get(part, 0) for part in _UNTIL_DRAWN)
    yield Activity("waiting", "shard", sequence.start_ns, begun, choice)
    yield Activity("prefill", "shard", begun, drawn, choice)
