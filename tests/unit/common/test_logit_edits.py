"""Bias, bans and penalties, in their order, on their own row alone (R22)."""

from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from services.common import logit_edits
from services.common.sampling import Row
from services.common.types import SamplingProgram

V = 50
BANNED = -math.inf


def row(token_ids: Any = (), output_start: int = 0, stops: tuple[int, ...] = (), least: int = 0, **program: Any) -> Row:
    return Row(SamplingProgram(**program), token_ids, output_start, 0, stop_token_ids=stops, min_tokens=least)


def raw(rows: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(7).normal(0, 3, (rows, V)).astype(np.float32)


def edited(logits: NDArray[np.float32], *rows: Row) -> NDArray[np.float32]:
    """What `apply` makes of the logits; both libraries must agree to the bit."""
    result, tensor = logits.copy(), torch.from_numpy(logits.copy())
    logit_edits.apply(result, rows)
    logit_edits.apply(tensor, rows)
    assert np.array_equal(result, tensor.numpy())
    return result


def changed(before: NDArray[np.float32], after: NDArray[np.float32]) -> set[int]:
    return set(np.flatnonzero(before != after).tolist())


PLAIN = row()


@pytest.mark.parametrize(
    "some",
    [
        row(logit_bias={3: 1.5}),
        row(allowed_token_ids=(3,)),
        row(bad_words=((3,),)),
        row([3], repetition_penalty=1.5),
        row([3], presence_penalty=0.5),
        row([3], frequency_penalty=0.5),
        row([1], stops=(3,), least=2),
    ],
)
def test_each_kind_of_edit_is_noticed_and_touches_its_row_alone(some: Row) -> None:
    before = raw(3)
    after = edited(before, PLAIN, some, PLAIN)
    assert logit_edits.needed(some)
    assert not logit_edits.needed(PLAIN)
    assert np.array_equal(after[0], before[0])
    assert np.array_equal(after[2], before[2])
    assert changed(before[1], after[1]) == (set(range(V)) - {3} if some.program.allowed_token_ids else {3})


def test_bias_is_added() -> None:
    before = raw()
    after = edited(before, row(logit_bias={0: 2.5, V - 1: -100.0}))
    assert after[0, 0] == np.float32(before[0, 0] + 2.5)
    assert after[0, V - 1] == np.float32(before[0, V - 1] - 100.0)
    assert changed(before, after) == {0, V - 1}


def test_order_of_the_edits() -> None:
    """Bias is penalised like any logit; no bias and no penalty brings back what is banned."""
    logits = np.zeros((1, V), np.float32)
    logits[0, 4] = -1.0
    program = {"logit_bias": {4: 3.0, 5: 50.0, 6: 50.0, 7: 50.0}, "allowed_token_ids": (4, 6, 7), "bad_words": ((6,),)}
    penalties = {"repetition_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": 0.5}
    after = edited(logits, row([4, 4, 6, 4], 1, (7,), 10, **program, **penalties))
    assert after[0, 4] == (-1.0 + 3.0) / 2.0 - (0.25 + 2 * 0.5)
    assert [after[0, i] for i in (5, 6, 7)] == [BANNED] * 3


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_is_that_of_transformers_over_the_whole_sequence(penalty: float) -> None:
    before, token_ids = raw(), [4, 9, 4, 30, 31]
    after = edited(before, row(token_ids, 3, repetition_penalty=penalty))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([token_ids]), torch.from_numpy(before.copy()))
    np.testing.assert_allclose(after, expected.numpy(), rtol=1e-6)
    assert changed(before, after) == set(token_ids)


def test_presence_and_frequency_look_at_this_generations_output() -> None:
    before = raw()
    after = edited(before, row([1, 2, 2, 5, 7, 5], 2, presence_penalty=0.5, frequency_penalty=0.25))
    expected = before.astype(np.float64)
    expected[0, [2, 7]] -= 0.75
    expected[0, 5] -= 1.0
    assert np.array_equal(after, expected.astype(np.float32))


@pytest.mark.parametrize("kind", [list, tuple, lambda ids: array("I", ids)])
def test_ids_may_be_any_sequence(kind: Any) -> None:
    some = row(kind([1, 2, 2, 5]), 1, repetition_penalty=1.5, presence_penalty=1.0, bad_words=((2, 5, 9),))
    assert changed(raw()[0], edited(raw(), some)[0]) == {1, 2, 5, 9}


def test_no_output_yet() -> None:
    before = raw()
    assert np.array_equal(edited(before, row([], 0, presence_penalty=1.0, repetition_penalty=2.0)), before)
    assert np.array_equal(edited(before, row([3, 4], 2, frequency_penalty=1.0)), before)


@pytest.mark.parametrize(
    ("word", "token_ids", "is_banned"),
    [
        ((9,), [], True),
        ((9,), [9], True),
        ((1, 9), [5, 1], True),
        ((1, 9), [1, 5], False),
        ((1, 9), [], False),
        ((1, 2, 9), [1, 2], True),
        ((1, 2, 9), [2], False),
        ((1, 2, 9), [7, 1, 2, 3], False),
        ((2, 2, 9), [2, 2, 2], True),
        ((), [1], False),
    ],
)
def test_bad_words_are_never_completed(word: tuple[int, ...], token_ids: list[int], is_banned: bool) -> None:
    before = raw()
    after = edited(before, row(token_ids, len(token_ids), bad_words=((30, 31), word)))
    assert changed(before, after) == ({9} if is_banned else set())
    assert after[0, 9] == (BANNED if is_banned else before[0, 9])


def test_bad_words_are_those_of_transformers() -> None:
    rng = np.random.default_rng(3)
    words = [rng.integers(0, 4, size).tolist() for size in (2, 2, 3, 3, 4)] + [[17]]
    processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=torch.tensor([V - 1]))
    for _ in range(50):
        token_ids = rng.integers(0, 4, 6).tolist()
        after = edited(raw(), row(token_ids, 0, bad_words=tuple(map(tuple, words))))
        expected = processor(torch.tensor([token_ids]), torch.from_numpy(raw()))
        assert np.array_equal(after, expected.numpy())


@pytest.mark.parametrize("count", range(5))
def test_stops_are_banned_before_min_tokens(count: int) -> None:
    token_ids, before = [1] * (4 + count), raw()
    after = edited(before, row(token_ids, 4, stops=(10, 11), least=3))
    processor = MinNewTokensLengthLogitsProcessor(4, 3, torch.tensor([10, 11]))
    assert np.array_equal(after, processor(torch.tensor([token_ids]), torch.from_numpy(before.copy())).numpy())
    assert changed(before, after) == ({10, 11} if count < 3 else set())
    assert logit_edits.needed(row(token_ids, 4, stops=(10, 11), least=3)) == (count < 3)


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    before = raw(2)
    outside = row(
        [1], 0, (V, 2), 5, logit_bias={V: 1.0, 3: 1.0}, bad_words=((V + 7,),), allowed_token_ids=(2, 3, V + 1)
    )
    after = edited(before, outside, PLAIN)
    assert after[0, 3] == np.float32(before[0, 3] + 1.0)
    assert set(np.flatnonzero(np.isfinite(after[0])).tolist()) == {3}
    assert np.array_equal(after[1], before[1])


def test_rows_are_edited_together_as_alone() -> None:
    before = raw(4)
    rows = [
        row([1, 2], 1, repetition_penalty=1.5, logit_bias={5: 1.0}),
        row([3], 0, presence_penalty=1.0, bad_words=((3, 4),)),
        row([], 0, (8,), 1, allowed_token_ids=(7, 8, 9)),
        row([9, 9, 9, 2], 1, frequency_penalty=0.3, repetition_penalty=0.7),
    ]
    together = edited(before, *rows)
    for i, some in enumerate(rows):
        assert np.array_equal(together[i : i + 1], edited(before[i : i + 1], some))
