"""What is drawn from is what transformers' processors leave, and the draws are distributed like it (R22)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import array_api_compat.torch
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from services.common import sampling
from services.common.sampling import Distribution, Row
from services.common.types import SamplingProgram
from tests.unit.common import naive_sampling

DRAWS = 20_000


def logits_of(size: int, scale: float = 2.0, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(0, 1, size) * scale).astype(np.float32)


def row_of(token_ids: Any = (), **program: Any) -> Row:
    return Row(SamplingProgram(**program), token_ids, 0, 0)


def distribution(logits: NDArray[np.float32], row: Row) -> Distribution:
    """The distribution; both libraries must give it."""
    result = sampling.distribution(logits, row)
    by_torch = sampling.distribution(torch.from_numpy(logits), row, xp=array_api_compat.torch)
    assert by_torch.token_ids == result.token_ids
    np.testing.assert_allclose(by_torch.probabilities, result.probabilities, rtol=1e-12)
    return result


def processors(program: SamplingProgram) -> Any:
    chain: list[LogitsProcessor] = []
    if program.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(program.repetition_penalty))
    chain.append(TemperatureLogitsWarper(program.temperature))
    if program.top_k:
        chain.append(TopKLogitsWarper(program.top_k))
    if program.top_p < 1.0:
        chain.append(TopPLogitsWarper(program.top_p))
    if program.min_p:
        chain.append(MinPLogitsWarper(program.min_p))
    return LogitsProcessorList(chain)


@pytest.mark.parametrize("size", [30, 3000])
@pytest.mark.parametrize(
    "program",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 25},
        {"top_k": 5000},
        {"top_p": 0.001},
        {"top_p": 0.6},
        {"top_p": 0.999},
        {"min_p": 0.001},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"repetition_penalty": 1.4},
        {"top_k": 20, "min_p": 0.1, "temperature": 0.8},
        {"top_p": 0.8, "min_p": 0.05, "temperature": 1.3, "repetition_penalty": 0.8},
    ],
)
def test_survivors_and_probabilities_are_those_of_transformers(program: dict[str, Any], size: int) -> None:
    token_ids = [3, 5, 3, 20]
    for seed in range(5):
        row, logits = row_of(token_ids, **{"temperature": 1.0, **program}), logits_of(size, seed=seed)
        scores = processors(row.program)(torch.tensor([token_ids]), torch.from_numpy(logits.astype(np.float64))[None])
        probabilities = torch.softmax(scores[0], dim=-1)
        result = distribution(logits, row)
        assert set(result.token_ids) == set(torch.nonzero(scores[0] > -torch.inf)[:, 0].tolist())
        np.testing.assert_allclose(result.probabilities, probabilities[result.token_ids].numpy(), rtol=1e-5)
        assert sorted(result.probabilities, reverse=True) == result.probabilities
        assert sum(result.probabilities) == pytest.approx(1.0, abs=1e-12)


def test_top_p_is_a_share_of_the_whole_row() -> None:
    """Z is computed once, where the whole row is: top-k before it does not make the nucleus smaller (R22)."""
    logits = np.log(np.asarray([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    assert distribution(logits, row_of(temperature=1.0, top_k=2, top_p=0.5)).token_ids == [0, 1]
    assert distribution(logits, row_of(temperature=1.0, top_p=0.39)).token_ids == [0]


def test_ties_at_every_cut_go_to_the_lower_ids() -> None:
    logits = np.asarray([0.0, 1.0, 1.0, 0.0, 1.0, 1.0], dtype=np.float32)
    assert distribution(logits, row_of(temperature=1.0, top_k=3)).token_ids == [1, 2, 4]
    assert distribution(logits, row_of(temperature=1.0, top_p=0.4)).token_ids == [1, 2]
    assert distribution(logits, row_of(temperature=1.0, min_p=0.9)).token_ids == [1, 2, 4, 5]
    assert distribution(logits, row_of(temperature=1.0)).token_ids == [1, 2, 4, 5, 0, 3]
    assert distribution(logits, row_of()) == ([1], [1.0])


def test_the_distribution_is_after_edits_and_does_not_change_the_logits() -> None:
    logits = logits_of(40)
    row = row_of([1, 2], temperature=1.0, logit_bias={7: 100.0}, allowed_token_ids=(3, 7, 9), bad_words=((9,),))
    assert distribution(logits, row).token_ids == [7, 3]
    assert distribution(logits, replace(row, program=replace(row.program, temperature=0.0))) == ([7], [1.0])
    assert np.array_equal(logits, logits_of(40))


@pytest.mark.parametrize("size", [300, 2000])
def test_it_agrees_with_the_naive_filters(size: int) -> None:
    rng = np.random.default_rng(size)
    for seed in range(30):
        logits = logits_of(size, 3.0, seed).round(1)
        program = SamplingProgram(
            temperature=float(rng.choice([0.5, 1.0, 2.0])),
            top_k=int(rng.choice([0, 3, 1500])),
            top_p=float(rng.choice([1.0, 0.5, 0.95])),
            min_p=float(rng.choice([0.0, 0.05])),
        )
        expected = naive_sampling.survivors(logits.tolist(), program)
        assert distribution(logits, Row(program, [], 0, 0)).token_ids == expected


def chi_square_probability(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """How probable a fit at least as bad is; tokens that are expected less than 10 times count as one."""
    expected = probabilities * counts.sum()
    rare = expected < 10
    seen = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2.0), torch.tensor(statistic / 2)))


PROGRAMS: list[dict[str, Any]] = [
    {},  # in two levels
    {"temperature": 0.4},
    {"logit_bias": {5: 3.0}, "bad_words": ((6,),)},
    {"top_k": 1000},  # the same distribution as the first, in one level
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"allowed_token_ids": tuple(range(0, 600, 20))},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 1.5, "logit_bias": {7: -2.0}},
]


def frequencies(logits: NDArray[np.float32], rows: list[Row]) -> NDArray[np.int64]:
    """How often each id is drawn, in batches of 100 rows."""
    batch = np.broadcast_to(logits, (100, len(logits))).copy()
    token_ids = [sampling.draw(batch, rows[i : i + 100]).token_ids for i in range(0, len(rows), 100)]
    return np.bincount(np.concatenate(token_ids), minlength=len(logits))


def check_frequencies(row: Row, rows: list[Row]) -> None:
    logits = logits_of(600)  # two blocks, the second one short
    exact = sampling.distribution(logits, row)
    probabilities = np.zeros(len(logits))
    probabilities[exact.token_ids] = exact.probabilities
    counts = frequencies(logits, rows)
    assert counts.sum() == DRAWS
    assert counts[probabilities == 0].sum() == 0
    assert chi_square_probability(counts, probabilities) > 1e-3


@pytest.mark.parametrize("program", PROGRAMS)
def test_frequencies_over_positions_are_those_of_the_distribution(program: dict[str, Any]) -> None:
    row = row_of(**{"temperature": 1.0, "seed": 77, **program})
    check_frequencies(row, [replace(row, token_ids=range(position)) for position in range(DRAWS)])


@pytest.mark.parametrize("program", [{}, {"top_k": 7}])
def test_frequencies_over_seeds_and_choices_are_too(program: dict[str, Any]) -> None:
    row = row_of(**{"temperature": 1.0, **program})
    check_frequencies(row, [replace(row, choice=choice) for choice in range(DRAWS)])
    check_frequencies(row, [replace(row, program=replace(row.program, seed=seed)) for seed in range(DRAWS)])
