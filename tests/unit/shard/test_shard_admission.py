"""Admissions that would harm the model or their neighbours are answered, and harm nobody."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.common.errors import ContextLengthExceeded, InvalidRequest
from services.common.types import pack_ids
from tests.unit.shard.fakes import VOCABULARY, alone
from tests.unit.shard.links import CONTEXT, PROMPT, System, admit, serving

BAD_ID = VOCABULARY


@pytest.fixture
async def system() -> AsyncIterator[System]:
    async with serving() as system:
        yield system


BAD_ADMITS: dict[str, tuple[dict[str, Any], str]] = {
    "no ids": ({"token_ids": b""}, "token_ids output_start"),
    "half an id": ({"token_ids": b"\1\0\0"}, "token_ids output_start"),
    "an id outside": ({"token_ids": pack_ids([1, BAD_ID, 2, 3, 4])}, "token_ids"),
    "the largest id": ({"token_ids": pack_ids([1, 2, 3, 4, 2**32 - 1])}, "token_ids"),
    "no generation": ({"generation_id": ""}, "generation_id"),
    "no prompt": ({"output_start": 0}, "output_start"),
    "a start behind the end": ({"output_start": 6}, "output_start"),
    "nothing left to draw": ({"output_start": 3, "max_count": 2}, "max_count"),
    "a stop outside": ({"stop_token_ids": [3, BAD_ID]}, "stop_token_ids"),
    "too many top tokens": ({"top_logprobs": 21}, "top_logprobs"),
    "a temperature that is no number": ({"sampling": {"temperature": float("nan")}}, "sampling.temperature"),
    "an infinite temperature": ({"sampling": {"temperature": float("inf")}}, "sampling.temperature"),
    "a negative temperature": ({"sampling": {"temperature": -1.0}}, "sampling.temperature"),
    "no top_p": ({"sampling": {"top_p": 0.0}}, "sampling.top_p"),
    "too much top_p": ({"sampling": {"top_p": 1.5}}, "sampling.top_p"),
    "too much min_p": ({"sampling": {"min_p": 1.5}}, "sampling.min_p"),
    "no repetition_penalty": ({"sampling": {"repetition_penalty": 0.0}}, "sampling.repetition_penalty"),
    "an infinite penalty": ({"sampling": {"presence_penalty": float("inf")}}, "sampling.presence_penalty"),
    "a penalty too large": ({"sampling": {"frequency_penalty": 101.0}}, "sampling.frequency_penalty"),
    "a bias outside": ({"sampling": {"logit_bias": {BAD_ID: 1.0}}}, "sampling.logit_bias"),
    "a bias that is no number": ({"sampling": {"logit_bias": {1: float("nan")}}}, "sampling.logit_bias"),
    "nothing allowed": ({"sampling": {"allowed_token_ids": {"ids": []}}}, "sampling.allowed_token_ids"),
    "something outside allowed": (
        {"sampling": {"allowed_token_ids": {"ids": [BAD_ID]}}},
        "sampling.allowed_token_ids",
    ),
    "an empty bad word": ({"sampling": {"bad_words": [{"ids": []}]}}, "sampling.bad_words"),
    "a bad word outside": ({"sampling": {"bad_words": [{"ids": [1, BAD_ID]}]}}, "sampling.bad_words"),
    "an attempt in use": ({"attempt": 1}, "attempt"),
    "a fork of another prompt": ({"fork_of": 1, "output_start": 4}, "fork_of"),
}


@pytest.mark.parametrize("name", BAD_ADMITS)
async def test_a_bad_admission_is_answered_and_harms_nobody(system: System, name: str) -> None:
    fields, violated = BAD_ADMITS[name]
    link = system.link()
    await link.send(admit(1), admit(**{"attempt": 2, **fields}), admit(3, [9, 9]))
    assert await link.until_tokens(1) == alone(PROMPT, 8)
    assert await link.until_tokens(3) == alone([9, 9], 8)
    (error,) = link.ended.values()
    assert isinstance(error, InvalidRequest)
    assert {violation.field for violation in error.violations} == set(violated.split())
    assert link.tokens(2) == []


async def test_all_that_is_wrong_is_named(system: System) -> None:
    link = system.link()
    await link.send(admit(max_count=0, sampling={"top_p": 2.0, "temperature": -1.0}))
    await link.until(lambda: bool(link.ended))
    named = {violation.field for violation in link.ended[1].violations}
    assert named == {"max_count", "sampling.top_p", "sampling.temperature"}


async def test_a_sequence_as_long_as_the_context_is_refused(system: System) -> None:
    link = system.link()
    await link.send(admit(1, [1] * CONTEXT), admit(2, [1] * (CONTEXT - 1)))
    assert await link.until_tokens(2, 1) == alone([1] * (CONTEXT - 1), 1)
    assert isinstance(link.ended[1], ContextLengthExceeded)
    assert link.ended[1].metadata == {"context_length": str(CONTEXT)}
