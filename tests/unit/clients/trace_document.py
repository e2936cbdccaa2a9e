"""Makes trace documents: a plausible generation in OTLP/JSON with slow tokens of every kind planted in it.

All numbers come from one seed. A planted token has more time in one part, and what else a real one would have: a step
with a prompt in it, a step number that jumps, another owner; and who was held up behind it catches up.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from services.common import attributes as names
from services.common.timings import Parts

GENERATION = "mfzw4zlsnvqxiyjromrtgnbvg4.0f3a5c7e9b1d2f46"
OTHERS = ("kq2xaylpmv4ginzxg5sdqobzge.5d81c0be7f20a913", "ovzwk4tuojuw4zzan5xgkidcn4.91c4d2a0836be57f")
MODEL = "tiny"
START = 1_760_000_000_000_000_000
"""Nanoseconds since the epoch at which the call arrived."""
SHARDS = ("9f2c1a", "c07b5d")
FIRST_STEP = 1177
PROMPT = (512, 188)
"""Tokens of the prompt that each of its steps computed."""
INTERNAL, SERVER, CLIENT = 1, 2, 3

FIRST: Mapping[str, int] = {
    **{"open": 210, "render": 340, "encode": 520, "claim": 1_150, "place": 90, "admission": 6_400, "prefill": 9_800},
    **{"schedule": 60, "forward": 11_300, "sample": 240, "publish": 110, "shard_hop": 380, "commit": 640},
    **{"relay": 70, "hop": 410, "queue": 40, "detokenize": 95, "write": 130, "unaccounted": 15},
}
"""Microseconds of the parts of a first token."""
RESUMED: Mapping[str, int] = {"hop": 310, "queue": 25, "detokenize": 60, "write": 30, "unaccounted": 1_400}
"""The same for the first token that a reader is told who came back."""
OF_SHARD: Mapping[str, tuple[int, int]] = {
    **{"wait": (180, 40), "schedule": (45, 6), "forward": (5_200, 260), "sample": (210, 20), "publish": (60, 10)},
    **{"shard_hop": (0, 25), "commit": (0, 20), "relay": (0, 15), "hop": (0, 30)},
}
OF_TOKENIZER: Mapping[str, tuple[int, int]] = {"queue": (0, 6), "detokenize": (0, 9), "write": (0, 12)}
"""Mean and deviation of the parts of other tokens in microseconds."""
LATER_PLACES = ("publish", "shard_hop", "commit", "relay", "hop", "queue", "detokenize", "write")
"""Parts behind which tokens pile up that are told at once afterwards."""
TAKEN_OVER = "unaccounted"
"""A token that is planted with this part has another owner and another shard than the one before."""


class Slow(NamedTuple):
    """What is planted at a token: microseconds in a part; steps left out, or tokens of a prompt in its step."""

    part: str
    microseconds: int
    left_out: int = 0
    prompt: int = 0


PLANTED: Mapping[int, Slow] = {
    31: Slow("commit", 48_000),
    57: Slow("forward", 375_000, prompt=512),
    90: Slow("wait", 62_000, left_out=3),
    121: Slow("write", 150_000),
    153: Slow("detokenize", 27_000),
    171: Slow("unaccounted", 512_000),
    200: Slow("shard_hop", 35_000),
    222: Slow("hop", 41_000),
}


@dataclass
class Plan:
    """What a document is to have.

    Attributes:
        tokens: of each choice.
        choices: how many.
        planted: slow tokens of each choice, by offset.
        forgotten: first tokens of a choice whose steps are not remembered.
        per_span: most tokens of a `decode` span.
        resumed_at: offset at which a second reader begins, a quarter of a second after the first one has left.
        told_twice: tokens that the first one was told from there on.
        error: why the request failed.
        packed: arrays of numbers are the text of a JSON array, as the services write them, and not OTLP's.
    """

    tokens: int = 240
    choices: int = 1
    planted: Mapping[int, Slow] = field(default_factory=lambda: PLANTED)
    forgotten: int = 0
    per_span: int = 1024
    resumed_at: int | None = None
    told_twice: int = 3
    error: str = ""
    packed: bool = True
    generation_id: str = GENERATION
    seed: int = 7


@dataclass
class Token:
    """One token as its reader was told it; moments are microseconds since the call arrived."""

    offset: int
    parts: dict[str, int]
    step: int
    shard: str
    departed: int

    @property
    def interval(self) -> int:
        return sum(self.parts.values())


def attribute_value(value: Any, *, packed: bool = False) -> dict[str, Any]:
    """A value as OTLP/JSON has it."""
    if packed and isinstance(value, list) and value and isinstance(value[0], int):
        return {"stringValue": json.dumps(value, separators=(",", ":"))}
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, str):
        return {"stringValue": value}
    return {"arrayValue": {"values": [attribute_value(item) for item in value]}}


def attribute_list(attributes: Mapping[str, Any], *, packed: bool = False) -> list[dict[str, Any]]:
    return [{"key": key, "value": attribute_value(value, packed=packed)} for key, value in attributes.items()]


class Spans:
    """The spans of three processes."""

    def __init__(self, plan: Plan) -> None:
        self._trace_id = f"{plan.seed:032x}"
        self._prefix = zlib.crc32(plan.generation_id.encode())
        self._packed = plan.packed
        self._count = 0
        self._by_service: dict[str, list[dict[str, Any]]] = {"tokenizer": [], "orchestrator": [], "shard": []}

    def add(
        self,
        service: str,
        name: str,
        parent: str,
        start: int,
        end: int,
        *,
        kind: int = INTERNAL,
        error: str = "",
        own_trace: bool = False,
        attributes: Mapping[str, Any] | None = None,
    ) -> str:
        """One span, with moments in microseconds since the call arrived; returns its id."""
        self._count += 1
        span_id = f"{self._prefix:08x}{self._count:08x}"
        span: dict[str, Any] = {
            "traceId": span_id * 2 if own_trace else self._trace_id,
            "spanId": span_id,
            "name": name,
            "kind": kind,
            "startTimeUnixNano": str(START + 1000 * start),
            "endTimeUnixNano": str(START + 1000 * end),
            "attributes": attribute_list(attributes or {}, packed=self._packed),
        }
        if parent:
            span["parentSpanId"] = parent
        if error:
            span["status"] = {"code": 2, "message": error}
        self._by_service[service].append(span)
        return span_id

    def document(self) -> dict[str, Any]:
        """All of them."""
        return {
            "resourceSpans": [
                {
                    "resource": {
                        "attributes": attribute_list(
                            {
                                "service.namespace": "fermata",
                                "service.name": f"fermata-{service}",
                                "service.instance.id": f"{service}-0",
                                "host.name": "node-a",
                                "process.pid": 4000 + index,
                            }
                        )
                    },
                    "scopeSpans": [{"scope": {"name": "fermata"}, "spans": spans}],
                }
                for index, (service, spans) in enumerate(self._by_service.items())
            ]
        }


def trace_document(plan: Plan | None = None) -> bytes:
    """The document of one generation."""
    plan = plan or Plan()
    spans = Spans(plan)
    choices = [list(_tokens(plan, random.Random(plan.seed + choice))) for choice in range(plan.choices)]
    end = max((tokens[-1].departed for tokens in choices if tokens), default=9_000) + 40
    call = _request_spans(spans, plan, end)
    for choice, tokens in enumerate(choices):
        _admission_spans(spans, plan, call, choice, tokens, end=end)
        _step_spans(spans, plan, tokens)
        for group in _readings(plan, tokens):
            for first in range(0, len(group), plan.per_span):
                _decode_span(spans, plan, call, choice, group[first : first + plan.per_span])
    return json.dumps(spans.document()).encode()


def merged(*documents: bytes) -> bytes:
    """One document with the spans of several."""
    return json.dumps(
        {"resourceSpans": [each for one in documents for each in json.loads(one)["resourceSpans"]]}
    ).encode()


def _tokens(plan: Plan, dice: random.Random) -> Iterator[Token]:
    """The tokens of a choice, as a reader is told them who reads from the begin to the end."""
    departed, step, shard = 0, FIRST_STEP + len(PROMPT) - 1, SHARDS[0]
    behind: dict[str, int] = {}
    for offset in range(plan.tokens):
        slow = plan.planted.get(offset)
        if offset == 0:
            parts = dict(FIRST)
        else:
            step += 1 + (slow.left_out if slow else 0)
            if slow and slow.part == TAKEN_OVER:
                step, shard = 88, SHARDS[1]
            parts = _usual_parts(dice, taken_over=bool(slow and slow.part == TAKEN_OVER))
            for part in list(behind):
                caught_up = min(behind[part], max(sum(parts.values()) - 180 - dice.randrange(120), 0))
                parts[part] = parts.get(part, 0) - caught_up
                behind[part] -= caught_up
        if slow:
            parts[slow.part] = parts.get(slow.part, 0) + slow.microseconds
            if slow.part in LATER_PLACES and offset:
                behind[slow.part] = behind.get(slow.part, 0) + slow.microseconds
        departed += sum(parts.values())
        yield Token(offset, parts, step, shard, departed)


def _usual_parts(dice: random.Random, *, taken_over: bool) -> dict[str, int]:
    usual = OF_TOKENIZER if taken_over else {**OF_SHARD, **OF_TOKENIZER}
    parts = {part: round(dice.gauss(mean, deviation)) for part, (mean, deviation) in usual.items()}
    return {**parts, "unaccounted": 0}


def _request_spans(spans: Spans, plan: Plan, end: int) -> str:
    """The call and how it was opened; returns the id of the span that stands for the request."""
    served = spans.add("tokenizer", "fermata.v1.GenerationService/StreamGenerate", "", -30, end + 20, kind=SERVER)
    prompt = sum(PROMPT)
    attributes = {
        names.OPERATION_NAME: "chat",
        names.REQUEST_MODEL: MODEL,
        names.RESPONSE_ID: plan.generation_id,
        names.RESPONSE_FINISH_REASONS: ["error" if plan.error else "stop"] * plan.choices,
        names.USAGE_INPUT_TOKENS: prompt,
        names.USAGE_OUTPUT_TOKENS: plan.tokens * plan.choices,
        names.USAGE_CACHE_READ_TOKENS: 64,
    }
    call = spans.add("tokenizer", f"chat {MODEL}", served, 0, end, error=plan.error, attributes=attributes)
    rendered = FIRST["open"] + FIRST["render"]
    sent = rendered + FIRST["encode"]
    claimed = sent + 200 + FIRST["claim"]
    spans.add("tokenizer", "render", call, FIRST["open"], rendered)
    spans.add("tokenizer", "encode", call, rendered, sent)
    method = "services.orchestrator.v1.OrchestratorService/Open"
    asked = spans.add("tokenizer", method, call, sent, claimed + 300, kind=CLIENT)
    opened = spans.add("orchestrator", method, asked, sent + 200, claimed + 100, kind=SERVER)
    spans.add("orchestrator", "claim", opened, sent + 200, claimed)
    spans.add("orchestrator", "place", opened, claimed, claimed + FIRST["place"])
    return call


def _admission_spans(spans: Spans, plan: Plan, call: str, choice: int, tokens: Sequence[Token], *, end: int) -> None:
    """Who owned the generation and which shards had a choice of it."""
    placed = sum(FIRST[part] for part in ("open", "render", "encode", "claim", "place")) + 200
    moves = [token for token in tokens if token.offset and token.shard != tokens[token.offset - 1].shard]
    begins = [placed, *(token.departed - 8_000 for token in moves)]
    ends = [*(token.departed - token.interval + 3_000 for token in moves), end]
    for place, (begin, stop) in enumerate(zip(begins, ends, strict=True)):
        owner = call
        if choice == 0:
            epoch = {names.EPOCH: 1_760_000_000_000 + place, names.GENERATION_ID: plan.generation_id}
            owner = spans.add("orchestrator", "own", call, begin - 20, stop, attributes=epoch)
            if place:
                spans.add("orchestrator", "takeover", owner, begin - 4_000, begin - 20, attributes=epoch)
        about = {names.CHOICE: choice, names.SHARD: SHARDS[place]}
        lost = "UNAVAILABLE" if stop != end else ""
        cached = {**about, names.CACHED_TOKENS: 64}
        admission = spans.add("orchestrator", "admission", owner, begin, stop, error=lost, attributes=cached)
        about[names.GENERATION_ID] = plan.generation_id
        spans.add("shard", "sequence", admission, begin + 190, stop - 150, attributes=about)


def _step_spans(spans: Spans, plan: Plan, tokens: Sequence[Token]) -> None:
    """The steps that drew the tokens, with others' sequences in them, and the one before of the prompt."""
    for token in tokens[plan.forgotten :]:
        slow = plan.planted.get(token.offset)
        batch = [(plan.generation_id, 1 if token.offset else PROMPT[1])]
        batch += [(OTHERS[0], 1)] * (20 <= token.offset < 160) + [(OTHERS[1], 1)] * (100 <= token.offset < 220)
        if slow and slow.prompt:
            batch.append((OTHERS[1], slow.prompt))
        forward = token.parts.get("forward") or OF_SHARD["forward"][0]
        drawn = token.departed - 900
        attributes = {
            names.SHARD: token.shard,
            names.STEP_NUMBER: token.step,
            names.STEP_TOKENS: sum(length for _, length in batch),
            names.STEP_GENERATIONS: [name for name, _ in batch],
            names.STEP_LENGTHS: [length for _, length in batch],
            names.part("schedule"): token.parts.get("schedule", 45),
            names.part("forward"): forward,
            names.part("sample"): token.parts.get("sample", 210),
        }
        spans.add("shard", "step", "", drawn - forward - 255, drawn, own_trace=True, attributes=attributes)


def _readings(plan: Plan, tokens: list[Token]) -> Iterator[list[Token]]:
    """The tokens as each reader was told them."""
    if plan.resumed_at is None:
        yield tokens
        return
    left_at = plan.resumed_at + plan.told_twice
    yield tokens[:left_at]
    departed = tokens[left_at - 1].departed + 250_000
    again = []
    for token in tokens[plan.resumed_at :]:
        known = token.offset < left_at
        parts = {"unaccounted": 60} if known else token.parts
        if token.offset == plan.resumed_at:
            parts = dict(RESUMED)
        departed += sum(parts.values())
        again.append(Token(token.offset, parts, 0 if known else token.step, "" if known else token.shard, departed))
    yield again


def _decode_span(spans: Spans, plan: Plan, call: str, choice: int, tokens: Sequence[Token]) -> None:
    """Up to `per_span` tokens in a row."""
    begin = tokens[0].departed - tokens[0].interval
    shards = [shard for shard in dict.fromkeys(token.shard for token in tokens) if shard]
    attributes: dict[str, Any] = {
        names.GENERATION_ID: plan.generation_id,
        names.CHOICE: choice,
        names.FIRST_OFFSET: tokens[0].offset,
        names.SHARDS: shards,
        names.TOKEN_SHARD: [shards.index(token.shard) if token.shard else -1 for token in tokens],
        names.TOKEN_STEP: [token.step for token in tokens],
        names.TOKEN_DEPARTED: [token.departed - begin for token in tokens],
    }
    for part in Parts._fields[1:]:
        values = [token.parts.get(part, 0) for token in tokens]
        if any(values):
            attributes[names.part(part)] = values
    spans.add("tokenizer", "decode", call, begin, tokens[-1].departed, attributes=attributes)
