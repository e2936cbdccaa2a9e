"""Order, masses and survivors of rows (R22), in both array libraries."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat.numpy
import array_api_compat.torch
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.common import logit_filters
from services.common.types import SamplingProgram

LIBRARIES = {"numpy": array_api_compat.numpy, "torch": array_api_compat.torch}


def as_array(library: str, values: NDArray[Any]) -> Any:
    return torch.from_numpy(values.copy()) if library == "torch" else values


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([-np.inf, -2.5, -1.0, -0.0, 0.0, 1.0, 1e30, 7.5]), min_size=9, max_size=9)),
    st.integers(1, 9),
)
def test_order_is_logit_descending_id_ascending(rows: list[list[float]], count: int) -> None:
    """Ties stand in the order of their ids, also those that the cut goes through, and both zeros are one."""
    logits = np.asarray(rows, dtype=np.float32).reshape(len(rows), 9)
    expected = [sorted(range(9), key=lambda i: (-row[i], i))[:count] for row in rows]
    for library, xp in LIBRARIES.items():
        assert logit_filters.first(xp, as_array(library, logits), count).tolist() == expected


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("count", [1, 50, 1024, 3000])
def test_order_of_wide_rows(library: str, count: int) -> None:
    logits = np.random.default_rng(count).normal(0, 4, (3, 3000)).astype(np.float32).round(1)
    result = logit_filters.first(LIBRARIES[library], as_array(library, logits), count)
    assert np.array_equal(np.asarray(result), np.argsort(-logits, axis=-1, kind="stable")[:, :count])


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("size", [1, 511, 512, 513, 1300, 70_000])
def test_masses_are_sums_of_exponentials_by_blocks(library: str, size: int) -> None:
    rng = np.random.default_rng(size)
    logits = rng.normal(0, 5, (2, size)).astype(np.float32)
    logits[0, 1 :: max(2, size // 3)] = -np.inf
    temperature = np.asarray([[0.7], [1.9]])
    peak = logits.max(axis=-1, keepdims=True)
    arrays = [as_array(library, values) for values in (logits, peak, temperature)]
    result = np.asarray(logit_filters.block_masses(LIBRARIES[library], *arrays))
    total = np.asarray(logit_filters.total_mass(LIBRARIES[library], *arrays))
    assert result.dtype == total.dtype == np.float64
    assert result.shape == (2, -(-size // 512))
    weights = np.exp((logits.astype(np.float64) - peak) / temperature)
    for row in range(2):
        blocks = [math.fsum(weights[row, start : start + 512]) for start in range(0, size, 512)]
        np.testing.assert_allclose(result[row], blocks, rtol=1e-13, atol=1e-300)
        assert total[row, 0] == pytest.approx(math.fsum(blocks), rel=1e-13)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 30.0])
def test_rough_masses_are_as_near_as_they_claim(library: str, temperature: float) -> None:
    logits = np.random.default_rng(9).normal(0, 4, (20, 5000)).astype(np.float32)
    temperatures = np.full((20, 1), temperature)
    arrays = [as_array(library, values) for values in (logits, logits.max(axis=-1, keepdims=True), temperatures)]
    exact = np.log(np.asarray(logit_filters.block_masses(LIBRARIES[library], *arrays)))
    rough = np.asarray(logit_filters.rough_block_masses(LIBRARIES[library], *arrays))
    assert rough.dtype == np.float32
    near = exact > -80
    assert near.sum() >= 20
    assert np.abs(np.log(rough[near].astype(np.float64)) - exact[near]).max() < 1e-4
    assert (rough[~near] < np.exp(-79.0)).all()


@pytest.mark.parametrize("library", LIBRARIES)
def test_masses_of_a_row_do_not_depend_on_its_company(library: str) -> None:
    """To the bit, at any number of rows and of threads."""
    xp, rng = LIBRARIES[library], np.random.default_rng(5)
    threads = torch.get_num_threads()
    for size in (300, 4096, 151_936):
        logits = rng.normal(0, 3, (5, size)).astype(np.float32)
        arrays = [as_array(library, a) for a in (logits, logits.max(-1, keepdims=True), np.full((5, 1), 0.8))]
        alone = [np.asarray(logit_filters.total_mass(xp, *(a[i : i + 1] for a in arrays))) for i in range(5)]
        try:
            torch.set_num_threads(2)
            together = np.asarray(logit_filters.total_mass(xp, *arrays))
            again = np.asarray(logit_filters.total_mass(xp, *(a[3:4] for a in arrays)))
        finally:
            torch.set_num_threads(threads)
        assert np.array_equal(together, np.concatenate(alone))
        assert np.array_equal(again, alone[3])


PROBABILITIES = np.asarray([[0.4, 0.3, 0.2, 0.05, 0.05]])


@pytest.mark.parametrize(
    ("program", "count"),
    [
        (SamplingProgram(), 5),
        (SamplingProgram(top_k=1), 1),
        (SamplingProgram(top_k=4), 4),  # exactly four, though the fourth and the fifth are equal
        (SamplingProgram(top_k=9), 5),
        (SamplingProgram(top_p=0.39), 1),
        (SamplingProgram(top_p=0.41), 2),
        (SamplingProgram(top_p=0.92), 4),
        (SamplingProgram(top_p=0.999999), 5),
        (SamplingProgram(min_p=1.0), 1),
        (SamplingProgram(min_p=0.7), 2),
        (SamplingProgram(min_p=0.2), 3),
        (SamplingProgram(min_p=0.1), 5),
        (SamplingProgram(top_k=3, top_p=0.41), 2),
        (SamplingProgram(top_k=2, top_p=0.6), 2),  # mass before the second: 0.4 of the whole row, not 0.4 / 0.7
        (SamplingProgram(top_p=0.92, min_p=0.5), 3),
    ],
)
@pytest.mark.parametrize("library", LIBRARIES)
def test_survivors(library: str, program: SamplingProgram, count: int) -> None:
    scores = np.log(PROBABILITIES / 0.4)
    total = np.asarray([[1 / 0.4]])
    kept = logit_filters.survivors(LIBRARIES[library], as_array(library, scores), as_array(library, total), [program])
    assert kept.tolist() == [[i < count for i in range(5)]]


@pytest.mark.parametrize("library", LIBRARIES)
def test_survivors_of_equal_tokens_are_counted_exactly(library: str) -> None:
    """Half of the mass of ten equal tokens is five of them: the mass before the sixth is not below it."""
    scores, total = as_array(library, np.zeros((2, 10))), as_array(library, np.full((2, 1), 10.0))
    programs = [SamplingProgram(top_p=0.5), SamplingProgram(top_p=0.51)]
    kept = logit_filters.survivors(LIBRARIES[library], scores, total, programs)
    assert [sum(row) for row in kept.tolist()] == [5, 6]
