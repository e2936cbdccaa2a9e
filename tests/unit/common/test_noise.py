"""The noise is Philox4x32-10 at an address, in float64 (R21)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common import noise
from tests.unit.common import naive_sampling

WORDS = st.integers(0, (1 << 32) - 1)
LARGEST = (1 << 32) - 1

KNOWN_ANSWERS = [  # "philox4x32 10" of kat_vectors in the Random123 distribution: counter, key, output
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def array(library: str, values: Any) -> Any:
    return torch.asarray(values) if library == "torch" else np.asarray(values)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_published_answers(counter: str, key: str, output: str) -> None:
    c, k = words(counter), words(key)
    assert list(noise.philox((c[0], c[1], c[2], c[3]), (k[0], k[1]))) == words(output)
    for library in ("numpy", "torch"):
        a, b, d, e, low, high = (array(library, [word]) for word in (*c, *k))
        result = noise.philox((a, b, d, e), (low, high))
        assert [word.tolist() for word in result] == [[word] for word in words(output)]


def test_published_answers_hold_side_by_side() -> None:
    """All three at once: lanes do not touch each other."""
    counters = np.asarray([words(counter) for counter, _, _ in KNOWN_ANSWERS]).T
    keys = np.asarray([words(key) for _, key, _ in KNOWN_ANSWERS]).T
    result = np.stack(noise.philox(tuple(counters), tuple(keys)))
    assert result.T.tolist() == [words(output) for _, _, output in KNOWN_ANSWERS]


@settings(deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS, WORDS, WORDS, WORDS), min_size=1, max_size=20))
def test_arrays_of_both_libraries_equal_plain_integers(lanes: list[tuple[int, ...]]) -> None:
    expected = [naive_sampling.philox(lane[:4], lane[4:]) for lane in lanes]
    for library in ("numpy", "torch"):
        c0, c1, c2, c3, low, high = array(library, np.asarray(lanes, dtype=np.int64).T.copy())
        result = noise.philox((c0, c1, c2, c3), (low, high))
        assert np.stack([np.asarray(word) for word in result]).T.tolist() == expected


@settings(deadline=None)
@given(st.integers(0, (1 << 64) - 1), WORDS, WORDS, WORDS, st.sampled_from([0, 1]))
def test_every_part_of_the_address_has_its_place(
    seed: int, token_id: int, position: int, choice: int, purpose: int
) -> None:
    expected = naive_sampling.gumbel(seed, token_id, position, choice, purpose)
    for library in ("numpy", "torch"):
        token, place, index, low, high = (
            array(library, [[word]]) for word in (token_id, position, choice, *noise.split_seed(seed))
        )
        result = noise.gumbel((token, place, index, purpose), (low, high))
        assert result.dtype == (torch.float64 if library == "torch" else np.float64)
        assert result.item() == pytest.approx(expected, rel=1e-14, abs=1e-14)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("tokens_of_each_row", [False, True])
def test_addresses_broadcast(library: str, tokens_of_each_row: bool) -> None:
    tokens = np.arange(14).reshape(2, 7) if tokens_of_each_row else np.arange(7).reshape(1, 7)
    columns = [
        np.asarray([[5], [LARGEST]]),
        np.asarray([[0], [3]]),
        np.asarray([[LARGEST], [1]]),
        np.asarray([[9], [8]]),
    ]
    position, choice, low, high = (array(library, column) for column in columns)
    given_tokens = array(library, tokens.copy())
    result = noise.gumbel((given_tokens, position, choice, 0), (low, high))
    assert result.shape == (2, 7)
    for i, j in np.ndindex(2, 7):
        p, c, lo, hi = (int(column[i, 0]) for column in columns)
        token_id = int(tokens[i if tokens_of_each_row else 0, j])
        expected = naive_sampling.gumbel(lo | hi << 32, token_id, p, c, 0)
        assert float(result[i, j]) == pytest.approx(expected, rel=1e-14, abs=1e-14)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3)])
def test_what_is_given_is_not_changed(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    arrays = [rng.integers(0, 1 << 32, shape) for _ in range(6)]
    copies = [a.copy() for a in arrays]
    c0, c1, c2, c3, low, high = arrays
    noise.gumbel((c0, c1, c2, c3), (low, high))
    noise.philox((c0, c1, c2, c3), (low, high))
    assert all((a == b).all() for a, b in zip(arrays, copies, strict=True))


def test_bounds_hold_at_both_ends_of_the_word() -> None:
    """In float32 the upper end would be infinite: the reason for float64."""
    smallest, largest = (-math.log(-math.log((word + 0.5) * 2.0**-32)) for word in (0, LARGEST))
    assert noise.SMALLEST_GUMBEL <= smallest < noise.SMALLEST_GUMBEL + 0.01
    assert noise.LARGEST_GUMBEL - 0.01 < largest <= noise.LARGEST_GUMBEL
    assert np.float32((LARGEST + 0.5) * 2.0**-32) == 1.0


def test_it_is_gumbel_noise_without_structure() -> None:
    """Mean, variance and distribution are Gumbel's; neighbours of any address word do not go together."""
    size = 1 << 17
    zero, running = np.zeros(size, np.int64), np.arange(size)
    standard_error = math.pi / math.sqrt(6 * size)
    for place in range(6):
        c0, c1, c2, c3, low, high = (running if i == place else zero for i in range(6))
        values = noise.gumbel((c0, c1, c2, c3), (low, high))
        assert abs(values.mean() - np.euler_gamma) < 5 * standard_error
        assert abs(values.var() - math.pi**2 / 6) < 0.05
        uniform = np.sort(np.exp(-np.exp(-values)))
        assert np.abs(uniform - (running + 0.5) / size).max() < 2.0 / math.sqrt(size)  # Kolmogorov-Smirnov, p < 0.001
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / math.sqrt(size)


def test_a_seed_has_two_words() -> None:
    assert noise.split_seed(0x0123456789ABCDEF) == (0x89ABCDEF, 0x01234567)
    assert noise.split_seed((1 << 64) - 1) == (LARGEST, LARGEST)
