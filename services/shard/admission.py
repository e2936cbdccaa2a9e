"""Turns an `Admit` message into an admission, and refuses what would harm the model or its neighbours.

The public face has validated the request already; this is the second line, in front of the tensors: an id outside the
vocabulary would read foreign memory, a number that is not finite would spread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from services.common.errors import ContextLengthExceeded, FieldViolation, InvalidRequest
from services.common.sampling import Row
from services.common.types import SamplingProgram, unpack_ids
from services.shard.sequence import Admission
from services.shard.v1 import shard_pb2

MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What fits this shard, in tokens and ids."""

    context_length: int
    vocabulary_size: int


def from_message(message: shard_pb2.Admit, link: int, limits: Limits) -> Admission:
    """The admission that a message asks for.

    Raises:
        InvalidRequest: fields are missing or out of range; it names all of them.
        ContextLengthExceeded: the known tokens leave no room for output.
    """
    check = _Check(limits)
    token_ids = check.packed_ids("token_ids", message.token_ids)
    check.that("generation_id", bool(message.generation_id), "it is empty")
    check.that("output_start", 1 <= message.output_start <= len(token_ids), "it must lie within token_ids")
    count = len(token_ids) - message.output_start
    check.that("max_count", message.max_count > count, "it is reached already")
    check.that("top_logprobs", message.top_logprobs <= MOST_TOP_LOGPROBS, f"at most {MOST_TOP_LOGPROBS}")
    check.ids("stop_token_ids", message.stop_token_ids)
    program = _program(message.sampling, check)
    check.raise_violations()
    if len(token_ids) >= limits.context_length:
        raise ContextLengthExceeded(
            f"{len(token_ids)} tokens leave no room in a context of {limits.context_length}",
            metadata={"context_length": str(limits.context_length)},
        )
    row = Row(
        program=program,
        token_ids=token_ids,
        output_start=message.output_start,
        choice=message.choice,
        stop_token_ids=tuple(message.stop_token_ids),
        min_tokens=message.min_tokens,
        top_logprobs=message.top_logprobs,
        logprobs=message.logprobs,
    )
    return Admission(
        link=link,
        attempt=message.attempt,
        generation_id=message.generation_id,
        epoch=message.epoch,
        tenant=message.tenant,
        token_ids=token_ids,
        row=row,
        max_count=message.max_count,
        grant=message.grant,
        fork_of=message.fork_of if message.HasField("fork_of") else None,
        priority=message.priority,
    )


def _program(message: shard_pb2.SamplingProgram, check: _Check) -> SamplingProgram:
    """The sampling program, with the ranges of the public contract."""
    check.number("temperature", message.temperature, 0, 100)
    check.number("top_p", message.top_p, 0, 1)
    check.that("sampling.top_p", message.top_p != 0, "it must be above 0")
    check.number("min_p", message.min_p, 0, 1)
    check.number("repetition_penalty", message.repetition_penalty, 0, 100)
    check.that("sampling.repetition_penalty", message.repetition_penalty != 0, "it must be above 0")
    check.number("presence_penalty", message.presence_penalty, -100, 100)
    check.number("frequency_penalty", message.frequency_penalty, -100, 100)
    check.ids("sampling.logit_bias", message.logit_bias)
    for bias in message.logit_bias.values():
        check.number("logit_bias", bias, -100, 100)
    allowed = None
    if message.HasField("allowed_token_ids"):
        allowed = tuple(message.allowed_token_ids.ids)
        check.that("sampling.allowed_token_ids", bool(allowed), "it allows nothing")
        check.ids("sampling.allowed_token_ids", allowed)
    for word in message.bad_words:
        check.that("sampling.bad_words", bool(word.ids), "an empty sequence is always completed")
        check.ids("sampling.bad_words", word.ids)
    return SamplingProgram(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        allowed_token_ids=allowed,
        bad_words=tuple(tuple(word.ids) for word in message.bad_words),
        seed=message.seed,
    )


class _Check:
    """Collects what is wrong with a message."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._violations: list[FieldViolation] = []

    def that(self, name: str, holds: bool, description: str) -> None:
        if not holds:
            self._violations.append(FieldViolation(name, description))

    def number(self, name: str, value: float, least: float, most: float) -> None:
        holds = math.isfinite(value) and least <= value <= most
        self.that(f"sampling.{name}", holds, f"{value} is not from {least} to {most}")

    def ids(self, name: str, token_ids: Iterable[int]) -> None:
        self.that(name, max(token_ids, default=0) < self._limits.vocabulary_size, "an id is outside the vocabulary")

    def packed_ids(self, name: str, packed: bytes) -> list[int]:
        """Unpacks a sequence, which must not be empty; an empty list where it is wrong."""
        if not packed or len(packed) % 4:
            self.that(name, False, f"{len(packed)} bytes are no sequence of u32")
            return []
        token_ids = unpack_ids(packed)
        self.ids(name, token_ids)
        return token_ids

    def raise_violations(self) -> None:
        if self._violations:
            named = "; ".join(f"{violation.field}: {violation.description}" for violation in self._violations)
            raise InvalidRequest(named, violations=self._violations)
