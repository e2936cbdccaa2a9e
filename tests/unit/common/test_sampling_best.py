"""A best id that comes with the logits is the token of a greedy row, and nothing else changes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from services.common import sampling
from services.common.sampling import Row
from services.common.types import SamplingProgram

GREEDY = SamplingProgram(temperature=0.0)
NEEDS_LOGITS = {
    "temperature": Row(SamplingProgram(temperature=0.7), [1, 2], 1, 0),
    "log-probability": Row(GREEDY, [1, 2], 1, 0, logprobs=True),
    "most probable": Row(GREEDY, [1, 2], 1, 0, top_logprobs=2),
    "bias": Row(SamplingProgram(temperature=0.0, logit_bias={7: 100.0}), [1, 2], 1, 0),
    "too short to stop": Row(GREEDY, [1, 2], 1, 0, stop_token_ids=[3], min_tokens=5),
}


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(1).normal(0, 3, (len(NEEDS_LOGITS) + 2, 700)).astype(np.float32)


def test_plain_greedy_rows_take_the_best_and_are_not_looked_at(logits: np.ndarray) -> None:
    unread = np.full_like(logits, np.nan)
    rows = [Row(GREEDY, [1], 1, 0, stop_token_ids=[3])] * len(logits)
    best = [*range(len(logits) - 1), -1]
    drawn = sampling.draw(unread, rows, best=best)
    assert drawn.token_ids == best
    assert all(map(math.isnan, drawn.logprobs)) and drawn.top == [[]] * len(rows)


def test_the_others_are_drawn_as_without_a_best(logits: np.ndarray) -> None:
    plain = Row(GREEDY, [1, 2], 1, 0)
    rows = [plain, *NEEDS_LOGITS.values(), plain]
    assert [sampling.reads_logits(row) for row in rows] == [False] + [True] * len(NEEDS_LOGITS) + [False]
    expected = sampling.draw(logits, rows)
    wrong_where_not_used = [int(logits[0].argmax()), *[699] * len(NEEDS_LOGITS), int(logits[-1].argmax())]
    logits[[0, -1]] = np.nan
    drawn = sampling.draw(logits, rows, best=wrong_where_not_used)
    assert drawn.token_ids == expected.token_ids
    np.testing.assert_array_equal(drawn.logprobs, expected.logprobs)
    assert drawn.top == expected.top


def test_only_rows_that_read_logits(logits: np.ndarray) -> None:
    rows = list(NEEDS_LOGITS.values())
    drawn = sampling.draw(logits[1:-1], rows, best=[0] * len(rows))
    assert drawn.token_ids == sampling.draw(logits[1:-1], rows).token_ids
