"""The rules that requests are held to, in one place: limits, forms, what this version does not do.

Every rule that a request breaks is reported at once, each with the path of its field. Messages are read and never
changed; what is valid here can still be refused by the model's template or by the session.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from google.protobuf import struct_pb2
from google.protobuf.duration_pb2 import Duration

from fermata.v1 import chat_pb2, common_pb2, generation_pb2, sampling_pb2
from services.common.errors import (
    FieldViolation,
    GenerationNotFound,
    InvalidRequest,
    ModelNotFound,
    NotYetSupported,
    SessionNotFound,
)
from services.common.types import GENERATION_PATTERN, SESSION_PATTERN
from services.tokenizer.chat_template import RESERVED_ARGUMENTS
from services.tokenizer.codec import ModelFacts

MAX_CHOICES = 8
MAX_MESSAGES = 256
MAX_STOP_STRINGS, MAX_STOP_STRING_BYTES = 16, 256
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS, MAX_BAD_WORD_BYTES = 64, 256
MAX_TOP_LOGPROBS = 20
MAX_REQUEST_ID_BYTES = MAX_USER_BYTES = 128
MAX_LABELS, MAX_LABEL_KEY_BYTES, MAX_LABEL_VALUE_BYTES = 16, 64, 256
MAX_PRIORITY = 100
MAX_PAGE_SIZE, DEFAULT_PAGE_SIZE = 1000, 50
MAX_TIME_LIMIT_SECONDS = 366 * 86400
MAX_REPORTED = 24
"""Violations that an answer names; more would not fit the metadata of a gRPC answer (8 KiB)."""

GENERATION_ID = re.compile(rf"{SESSION_PATTERN.pattern}\.{GENERATION_PATTERN.pattern}")


class Range(NamedTuple):
    """What a number may be."""

    name: str
    low: float
    high: float
    open_low: bool = False

    def allows(self, value: float) -> bool:
        """NaN is in no range."""
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


SAMPLING_RANGES = (
    Range("temperature", 0, 100),
    Range("top_p", 0, 1, open_low=True),
    Range("min_p", 0, 1),
    Range("repetition_penalty", 0, 100, open_low=True),
    Range("presence_penalty", -100, 100),
    Range("frequency_penalty", -100, 100),
)
LOGIT_BIAS_RANGE = Range("logit_bias", -100, 100)
NOT_YET_SUPPORTED = ("prompt_logprobs", "stages")
"""Options of the output that are part of the contract only."""


class Violations:
    """Collects what is wrong with a request."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def require(self, condition: bool, field: str, description: str) -> None:
        """Notes a violation unless the condition holds."""
        if not condition:
            self._found.append(FieldViolation(field, description))

    def raise_if_any(self) -> None:
        """Reports all at once.

        Raises:
            InvalidRequest: there are some.
        """
        if not self._found:
            return
        fields = ", ".join(violation.field for violation in self._found[:3])
        more = f" and {len(self._found) - 3} more" if len(self._found) > 3 else ""
        raise InvalidRequest(f"invalid request: {fields}{more}", violations=self._found[:MAX_REPORTED])


def check_model(model: str, facts: ModelFacts) -> None:
    """Raises ModelNotFound unless the model is the one that is served; empty takes it."""
    if model not in ("", facts.name):
        raise ModelNotFound(f"no model {model!r} is served", metadata={"model": model})


def check_session_id(session_id: str) -> None:
    """Raises SessionNotFound for what cannot be a session's id."""
    if not SESSION_PATTERN.fullmatch(session_id):
        raise SessionNotFound("there is no such session", metadata={"session_id": session_id[:128]})


def check_generation_id(generation_id: str) -> None:
    """Raises GenerationNotFound for what cannot be a generation's id."""
    if not GENERATION_ID.fullmatch(generation_id):
        raise GenerationNotFound("there is no such generation", metadata={"generation_id": generation_id[:128]})


def check_generation(request: generation_pb2.GenerationRequest, facts: ModelFacts) -> None:
    """Checks a request for a generation.

    Raises:
        ModelNotFound: another model is asked for.
        InvalidRequest: fields break the rules.
        NotYetSupported: an option of the contract that this version does not have.
        SessionNotFound, GenerationNotFound: ids that cannot exist.
    """
    check_model(request.model, facts)
    found = Violations()
    _check_input(found, request, facts)
    _check_sampling(found, request.sampling, facts)
    _check_stop(found, request.stop, facts)
    _check_rest(found, request)
    found.raise_if_any()
    for name in NOT_YET_SUPPORTED:
        if getattr(request.output, name):
            raise NotYetSupported(f"generation.output.{name} is not supported yet")
    if request.session_id:
        check_session_id(request.session_id)
    if request.HasField("continue_from"):
        check_generation_id(request.continue_from.generation_id)


def _check_input(found: Violations, request: generation_pb2.GenerationRequest, facts: ModelFacts) -> None:
    kind = request.WhichOneof("input")
    found.require(kind is not None, "generation.input", "one of chat, prompt and token_ids is needed")
    if kind == "chat":
        continues = bool(request.session_id) and request.chat.continue_final_message
        check_chat(found, "generation.chat", request.chat, may_be_empty=continues)
    elif kind == "prompt":
        found.require(bool(request.prompt), "generation.prompt", "must not be empty")
    elif kind == "token_ids":
        found.require(bool(request.token_ids.ids), "generation.token_ids.ids", "must not be empty")
        check_ids(found, "generation.token_ids.ids", request.token_ids.ids, facts)


def check_chat(found: Violations, path: str, chat: chat_pb2.ChatInput, *, may_be_empty: bool = False) -> None:
    """Checks a conversation; `path` is its field."""
    found.require(bool(chat.messages) or may_be_empty, f"{path}.messages", "at least one message is needed")
    if len(chat.messages) > MAX_MESSAGES:
        found.require(False, f"{path}.messages", f"at most {MAX_MESSAGES} messages are allowed")
        return
    for index, message in enumerate(chat.messages):
        known = message.role in chat_pb2.Role.values() and message.role != chat_pb2.ROLE_UNSPECIFIED
        found.require(known, f"{path}.messages[{index}].role", "must be one of the roles of fermata.v1.Role")
        empty = next((place for place, part in enumerate(message.content) if part.WhichOneof("part") is None), None)
        found.require(empty is None, f"{path}.messages[{index}].content[{empty}]", "holds nothing that is known")
    for index, tool in enumerate(chat.tools):
        found.require(_is_finite(tool), f"{path}.tools[{index}]", "numbers must be finite")
    for name in chat.template_arguments.fields:
        usable = name.isidentifier() and not name.startswith("_") and name not in RESERVED_ARGUMENTS
        found.require(usable, f"{path}.template_arguments.{name[:64]}", "this name is reserved")
    found.require(_is_finite(chat.template_arguments), f"{path}.template_arguments", "numbers must be finite")


def check_ids(found: Violations, path: str, token_ids: Sequence[int], facts: ModelFacts) -> None:
    """Checks that ids are in the vocabulary; the first that is not is named."""
    if token_ids and max(token_ids) >= facts.vocabulary_size:
        place = next(index for index, token_id in enumerate(token_ids) if token_id >= facts.vocabulary_size)
        found.require(False, f"{path}[{place}]", f"must be below {facts.vocabulary_size}")


def _check_sampling(found: Violations, sampling: sampling_pb2.SamplingParams, facts: ModelFacts) -> None:
    path = "generation.sampling"
    for rule in SAMPLING_RANGES:
        given = sampling.HasField(rule.name)  # type: ignore[arg-type]  # the table has names of fields only
        found.require(
            not given or rule.allows(getattr(sampling, rule.name)), f"{path}.{rule.name}", f"must be in {rule}"
        )
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        found.require(False, f"{path}.logit_bias", f"at most {MAX_LOGIT_BIAS} entries are allowed")
    else:
        for token_id, bias in sampling.logit_bias.items():
            field = f"{path}.logit_bias[{token_id}]"
            found.require(token_id < facts.vocabulary_size, field, f"ids must be below {facts.vocabulary_size}")
            found.require(LOGIT_BIAS_RANGE.allows(bias), field, f"must be in {LOGIT_BIAS_RANGE}")
    if sampling.HasField("allowed_token_ids"):
        found.require(bool(sampling.allowed_token_ids.ids), f"{path}.allowed_token_ids.ids", "must not be empty")
        check_ids(found, f"{path}.allowed_token_ids.ids", sampling.allowed_token_ids.ids, facts)
    _check_texts(found, f"{path}.bad_words", sampling.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_BYTES)


def _check_stop(found: Violations, stop: sampling_pb2.StoppingParams, facts: ModelFacts) -> None:
    path = "generation.stop"
    found.require(not stop.HasField("max_tokens") or stop.max_tokens > 0, f"{path}.max_tokens", "must be at least 1")
    most = stop.max_tokens if stop.max_tokens else facts.context_length
    found.require(stop.min_tokens <= most, f"{path}.min_tokens", f"must be at most {most}")
    _check_texts(found, f"{path}.strings", stop.strings, MAX_STOP_STRINGS, MAX_STOP_STRING_BYTES)
    if len(stop.token_ids) > MAX_STOP_TOKENS:
        found.require(False, f"{path}.token_ids", f"at most {MAX_STOP_TOKENS} ids are allowed")
    else:
        check_ids(found, f"{path}.token_ids", stop.token_ids, facts)


def _check_texts(found: Violations, path: str, texts: Sequence[str], most: int, most_bytes: int) -> None:
    if len(texts) > most:
        found.require(False, path, f"at most {most} are allowed")
        return
    for index, text in enumerate(texts):
        found.require(1 <= len(text.encode()) <= most_bytes, f"{path}[{index}]", f"must have 1 to {most_bytes} bytes")


def _check_rest(found: Violations, request: generation_pb2.GenerationRequest) -> None:
    root = "generation"
    _check_length(found, f"{root}.request_id", request.request_id, MAX_REQUEST_ID_BYTES)
    _check_length(found, f"{root}.user", request.user, MAX_USER_BYTES)
    chosen = not request.HasField("n") or 1 <= request.n <= MAX_CHOICES
    found.require(chosen, f"{root}.n", f"must be in [1, {MAX_CHOICES}]")
    most = MAX_TOP_LOGPROBS
    found.require(request.output.top_logprobs <= most, f"{root}.output.top_logprobs", f"must be at most {most}")
    known = request.durability in common_pb2.Durability.values()
    found.require(known, f"{root}.durability", "must be one of fermata.v1.Durability")
    if request.HasField("time_limit"):
        field, limit = f"{root}.time_limit", MAX_TIME_LIMIT_SECONDS
        found.require(_in_milliseconds(request.time_limit) > 0, field, f"must be at least 1 ms and at most {limit} s")
    allowed = abs(request.priority) <= MAX_PRIORITY
    found.require(allowed, f"{root}.priority", f"must be in [{-MAX_PRIORITY}, {MAX_PRIORITY}]")
    _check_labels(found, f"{root}.labels", request.labels)
    if request.HasField("continue_from"):
        parent, field = request.continue_from, f"{root}.continue_from"
        inside = bool(request.session_id) and parent.generation_id.startswith(f"{request.session_id}.")
        # An id of no form at all is "not found", as everywhere.
        inside = inside or (bool(request.session_id) and not GENERATION_ID.fullmatch(parent.generation_id))
        found.require(inside, f"{field}.generation_id", "must be a generation of session_id")
        found.require(parent.choice < MAX_CHOICES, f"{field}.choice", f"must be below {MAX_CHOICES}")


def _check_labels(found: Violations, path: str, labels: Mapping[str, str]) -> None:
    if len(labels) > MAX_LABELS:
        found.require(False, path, f"at most {MAX_LABELS} are allowed")
        return
    for key, value in labels.items():
        fits = 1 <= len(key.encode()) <= MAX_LABEL_KEY_BYTES and len(value.encode()) <= MAX_LABEL_VALUE_BYTES
        description = f"keys must have 1 to {MAX_LABEL_KEY_BYTES} bytes, values at most {MAX_LABEL_VALUE_BYTES}"
        found.require(fits, f"{path}[{key[:64]}]", description)


def _check_length(found: Violations, path: str, text: str, most_bytes: int) -> None:
    found.require(len(text.encode()) <= most_bytes, path, f"must have at most {most_bytes} bytes")


def check_name(name: generation_pb2.GenerationName) -> None:
    """Checks how a call names a generation.

    Raises:
        InvalidRequest: it is not named, or by two that do not agree.
        GenerationNotFound, SessionNotFound: ids that cannot exist.
    """
    found = Violations()
    kind = name.WhichOneof("name")
    found.require(kind is not None, "generation", "one of generation_id and request_id is needed")
    if kind == "request_id":
        found.require(bool(name.request_id), "generation.request_id", "must not be empty")
        _check_length(found, "generation.request_id", name.request_id, MAX_REQUEST_ID_BYTES)
    found.raise_if_any()
    if kind == "generation_id":
        check_generation_id(name.generation_id)
        same = not name.session_id or name.generation_id.startswith(f"{name.session_id}.")
        found.require(same, "generation.session_id", "is not the session of generation_id")
        found.raise_if_any()
    elif name.session_id:
        check_session_id(name.session_id)


def check_resume(request: generation_pb2.ResumeRequest, facts: ModelFacts) -> None:
    """Checks where a reader wants to go on.

    Raises:
        InvalidRequest: cursors or tails are not of a form that can be used.
        GenerationNotFound, SessionNotFound: as `check_name`.
    """
    found = Violations()
    counts: dict[int, int] = {}
    for index, cursor in enumerate(request.cursors[:MAX_CHOICES]):
        path = f"cursors[{index}]"
        usable = cursor.choice < MAX_CHOICES and cursor.choice not in counts
        found.require(usable, f"{path}.choice", f"must be below {MAX_CHOICES} and named once")
        found.require(len(cursor.running_hash) in (0, 8), f"{path}.running_hash", "must have 8 bytes or none")
        counts[cursor.choice] = cursor.count
    seen: set[int] = set()
    for index, tail in enumerate(request.tails[:MAX_CHOICES]):
        path = f"tails[{index}]"
        usable = tail.choice in counts and tail.choice not in seen
        found.require(usable, f"{path}.choice", "must have a cursor and be named once")
        seen.add(tail.choice)
        check_ids(found, f"{path}.token_ids", tail.token_ids, facts)
        reaches = tail.first_offset + len(tail.token_ids) == counts.get(tail.choice, -1)
        found.require(reaches, f"{path}.token_ids", "must reach from first_offset up to the cursor")
    for field, items in (("cursors", len(request.cursors)), ("tails", len(request.tails))):
        found.require(items <= MAX_CHOICES, field, f"at most {MAX_CHOICES} are allowed")
    found.raise_if_any()
    check_name(request.generation)


def check_page_size(page_size: int) -> int:
    """The size of a page; 0 takes the default.

    Raises:
        InvalidRequest: it is out of range.
    """
    found = Violations()
    found.require(0 <= page_size <= MAX_PAGE_SIZE, "page_size", f"must be in [0, {MAX_PAGE_SIZE}]")
    found.raise_if_any()
    return page_size or DEFAULT_PAGE_SIZE


def time_limit_ms(limit: Duration) -> int:
    """A checked time limit in milliseconds."""
    return _in_milliseconds(limit)


def _in_milliseconds(duration: Duration) -> int:
    """Milliseconds, rounded down; 0 for what is not a usable limit."""
    if not 0 <= duration.nanos < 1_000_000_000 or not 0 <= duration.seconds <= MAX_TIME_LIMIT_SECONDS:
        return 0
    return duration.seconds * 1000 + duration.nanos // 1_000_000


def _is_finite(struct: struct_pb2.Struct) -> bool:
    """Whether all numbers of a JSON object are finite."""
    return all(map(_is_finite_value, struct.fields.values()))


def _is_finite_value(value: struct_pb2.Value) -> bool:
    kind = value.WhichOneof("kind")
    if kind == "number_value":
        return math.isfinite(value.number_value)
    if kind == "struct_value":
        return _is_finite(value.struct_value)
    items: Iterable[struct_pb2.Value] = value.list_value.values if kind == "list_value" else ()
    return all(map(_is_finite_value, items))
