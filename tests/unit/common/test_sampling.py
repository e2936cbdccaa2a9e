"""The draw of a batch is, row by row, that of R21 and R22: in both libraries, in any company, by any shortcut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import array_api_compat.torch
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.common import failpoints, logit_filters, sampling
from services.common.sampling import Drawn, Row
from services.common.types import SamplingProgram
from tests.unit.common import naive_sampling

Logits = NDArray[np.float32]

PROGRAMS = st.builds(
    SamplingProgram,
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 2.5, 40.0]),
    top_k=st.sampled_from([0, 0, 0, 1, 2, 40, 1100]),
    top_p=st.sampled_from([1.0, 1.0, 1.0, 0.05, 0.5, 0.9, 0.9999]),
    min_p=st.sampled_from([0.0, 0.0, 0.0, 0.02, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.25, -0.5]),
    logit_bias=st.dictionaries(st.integers(0, 4), st.sampled_from([-100.0, -1.5, 0.3, 100.0]), max_size=2),
    allowed_token_ids=st.none() | st.none() | st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple),
    bad_words=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), max_size=2).map(tuple),
    seed=st.integers(0, (1 << 64) - 1),
)
"""Ids of the edits are small, so that they meet each other and the most probable tokens."""


@st.composite
def draws(draw: st.DrawFn) -> tuple[Row, int, int]:
    """A row, its id for `logits_of`, and which logits."""
    token_ids = draw(st.lists(st.integers(0, 4), max_size=8))
    row = Row(
        draw(PROGRAMS),
        token_ids,
        draw(st.integers(0, len(token_ids))),
        draw(st.integers(0, 7)),
        stop_token_ids=draw(st.lists(st.integers(0, 4), max_size=2)),
        min_tokens=draw(st.integers(0, 4)),
    )
    return row, draw(st.integers(0, 1 << 16)), draw(st.integers(0, 3))


def logits_of(seed: int, kind: int, size: int) -> Logits:
    """Continuous, full of ties, flat, or with one token far above the others."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 3, size)
    if kind == 1:
        values = values.round()
    elif kind == 2:
        values = values * 0.01
    elif kind == 3:
        values[rng.integers(0, size)] += 30
    return values.astype(np.float32)


def everywhere(logits: Logits, rows: Sequence[Row]) -> list[Drawn]:
    """The draw of NumPy arrays, of tensors, and of tensors in torch."""
    tensor = torch.from_numpy(logits)
    return [
        sampling.draw(logits, rows),
        sampling.draw(tensor, rows),
        sampling.draw(tensor, rows, xp=array_api_compat.torch),
    ]


def plain(count: int, **program: Any) -> list[Row]:
    """Rows at positions 0, 1, 2 ..."""
    return [Row(SamplingProgram(**program), range(position), 0, 0) for position in range(count)]


@settings(deadline=None, max_examples=100)
@given(st.lists(draws(), min_size=1, max_size=4), st.sampled_from([5, 37, 512, 513, 1400]))
def test_every_draw_is_that_of_the_rules(cases: list[tuple[Row, int, int]], size: int) -> None:
    logits = np.stack([logits_of(seed, kind, size) for _, seed, kind in cases])
    rows = [row for row, _, _ in cases]
    expected = [naive_sampling.draw(values, row) for values, row in zip(logits.tolist(), rows, strict=True)]
    assert [drawn.token_ids for drawn in everywhere(logits, rows)] == [expected] * 3


@settings(deadline=None, max_examples=30)
@given(st.lists(draws(), min_size=1, max_size=12), st.sampled_from([40, 700]), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_its_company(cases: list[tuple[Row, int, int]], size: int, random: Any) -> None:
    """Tokens and log-probabilities, to the bit."""
    logits = np.stack([logits_of(seed, kind, size) for _, seed, kind in cases])
    rows = [replace(row, logprobs=True, top_logprobs=i % 4) for i, (row, _, _) in enumerate(cases)]
    order = random.sample(range(len(rows)), len(rows))
    for together, shuffled in zip(
        everywhere(logits, rows), everywhere(logits[order], [rows[i] for i in order]), strict=True
    ):
        alone = [sampling.draw(logits[i : i + 1], [row]) for i, row in enumerate(rows)]
        assert together.token_ids == [drawn.token_ids[0] for drawn in alone]
        assert [together.token_ids[i] for i in order] == shuffled.token_ids
        assert repr([together.logprobs[i] for i in order]) == repr(shuffled.logprobs)
        assert [together.top[i] for i in order] == shuffled.top
    by_numpy = everywhere(logits, rows)[0]
    assert repr(by_numpy.logprobs) == repr([drawn.logprobs[0] for drawn in alone])
    assert by_numpy.top == [drawn.top[0] for drawn in alone]


def test_the_logits_are_not_changed() -> None:
    logits = logits_of(1, 0, 100)[None, :].repeat(3, axis=0)
    before = logits.copy()
    rows = [
        Row(SamplingProgram(temperature=1.0, logit_bias={1: 5.0}, allowed_token_ids=(1, 2)), [1], 0, 0),
        Row(SamplingProgram(temperature=1.0), [1], 0, 0, top_logprobs=3),
        Row(SamplingProgram(top_k=2, temperature=0.5, repetition_penalty=3.0), [1], 0, 0),
    ]
    everywhere(logits, rows)
    sampling.distribution(logits[0], rows[0])
    assert np.array_equal(logits, before)


def test_greedy_takes_the_lowest_id_of_equals_whatever_the_filters() -> None:
    logits = np.zeros((4, 600), np.float32)
    logits[0, [599, 7, 550]] = 2.0
    logits[1] = -1.0
    logits[2, 300] = -0.0
    logits[3, 5] = 1.0
    rows = [*plain(3), Row(SamplingProgram(top_k=1, top_p=0.1, min_p=1.0, logit_bias={9: 1.0, 8: 1.0}), [], 0, 0)]
    assert [drawn.token_ids for drawn in everywhere(logits, rows)] == [[7, 0, 0, 5]] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("program", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {"min_p": 0.1}])
def test_a_row_that_is_not_finite_fails_alone(bad: float, program: dict[str, Any]) -> None:
    logits = logits_of(2, 0, 600)[None, :].repeat(5, axis=0)
    healthy = sampling.draw(logits, plain(5, **program))
    logits[1, 599], logits[3, 0] = bad, bad
    rows = [replace(row, logprobs=True, top_logprobs=2) for row in plain(5, **program)]
    rows[3] = replace(rows[3], program=replace(rows[3].program, logit_bias={0: -100.0}, bad_words=((0,),)))
    for drawn in everywhere(logits, rows):
        assert drawn.token_ids == [-1 if i in (1, 3) else token_id for i, token_id in enumerate(healthy.token_ids)]
        assert [math.isnan(value) for value in drawn.logprobs] == [i in (1, 3) for i in range(5)]
        assert [len(top) for top in drawn.top] == [0 if i in (1, 3) else 2 for i in range(5)]
    assert sampling.distribution(logits[1], rows[1]) == ([], [])


@pytest.mark.parametrize("program", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_a_row_without_any_token_fails_alone(program: dict[str, Any]) -> None:
    logits = logits_of(3, 0, 3)[None, :].repeat(2, axis=0)
    nothing = Row(SamplingProgram(bad_words=((0,), (2,)), **program), [], 0, 0, stop_token_ids=(1,), min_tokens=1)
    rest = plain(1, **program)
    for drawn in everywhere(logits, [nothing, *rest]):
        assert drawn.token_ids == [-1, sampling.draw(logits[1:], rest).token_ids[0]]
    assert sampling.distribution(logits[0], nothing) == ([], [])


@pytest.mark.parametrize(("top_p", "scale", "whole_rows"), [(0.9, 8.0, 0), (0.9, 0.1, 3), (0.01, 0.1, 0)])
def test_the_whole_row_is_ordered_only_where_1024_tokens_do_not_decide(
    monkeypatch: pytest.MonkeyPatch, top_p: float, scale: float, whole_rows: int
) -> None:
    """The token is the same if the shortcut is taken away or made much shorter."""
    logits = (np.random.default_rng(4).normal(0, 1, (3, 5000)) * scale).astype(np.float32)
    rows = plain(3, temperature=1.0, top_p=top_p)
    first, counts = logit_filters.first, []

    def spy(xp: Any, some: Any, count: int) -> Any:
        counts.append(count)
        return first(xp, some, count)

    monkeypatch.setattr(logit_filters, "first", spy)
    token_ids = sampling.draw(logits, rows).token_ids
    assert counts.count(5000) == whole_rows
    assert set(counts) <= {1024, 5000}
    for candidates in (1, 16, 5000):
        monkeypatch.setattr(sampling, "CANDIDATES", candidates)
        assert sampling.draw(logits, rows).token_ids == token_ids


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 300}, {"top_p": 0.97}, {"min_p": 1e-4}, {"allowed_token_ids": tuple(range(0, 600, 2))}]
)
def test_unlikely_tokens_have_their_turns_at_the_right_places(filters: dict[str, Any]) -> None:
    """Token by token what the rules say, where one token in three is far from the most probable ones."""
    logits = logits_of(8, 0, 600)[None, :].repeat(60, axis=0)
    rows = plain(60, temperature=1.0, seed=1 << 63, **filters)
    expected = [naive_sampling.draw(values, row) for values, row in zip(logits.tolist(), rows, strict=True)]
    assert sum(logits[0].max() - logits[0, token_id] > 4 for token_id in expected) >= 10
    assert [drawn.token_ids for drawn in everywhere(logits, rows)] == [expected] * 3


def test_blocks_that_float32_cannot_tell_apart_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks whose chances differ by some 1e-8: float32 alone errs, the draw does not."""
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 1, (40, 1024)).astype(np.float32)
    rows = plain(40, temperature=1.0, seed=21)
    for row, values in zip(rows, logits, strict=True):
        lead = [naive_sampling.gumbel(21, block, len(row.token_ids), 0, 1) for block in (0, 1)]
        lead += [float(np.log(np.exp(part.astype(np.float64)).sum())) for part in (values[:512], values[512:])]
        values[512:] += np.float32(lead[0] + lead[2] - lead[1] - lead[3])
    expected = [naive_sampling.draw(values, row) for values, row in zip(logits.tolist(), rows, strict=True)]
    assert 10 < sum(token_id >= 512 for token_id in expected) < 30
    assert [drawn.token_ids for drawn in everywhere(logits, rows)] == [expected] * 3
    monkeypatch.setattr(sampling, "_ROUGHNESS", 1e-12)
    assert sampling.draw(logits, rows).token_ids != expected


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ({}, False),
        ({"temperature": 0.5}, True),
        ({"temperature": 0.5, "repetition_penalty": 2.0, "logit_bias": {1: 1.0}, "bad_words": ((1,),)}, True),
        ({"temperature": 0.5, "top_k": 100_000}, False),
        ({"temperature": 0.5, "top_p": 0.999999}, False),
        ({"temperature": 0.5, "min_p": 1e-9}, False),
        ({"temperature": 0.5, "allowed_token_ids": (1, 2)}, False),
    ],
)
def test_when_a_draw_has_two_levels(program: dict[str, Any], expected: bool) -> None:
    assert sampling.draws_in_two_levels(SamplingProgram(**program)) is expected


def test_extreme_temperatures_are_just_temperatures() -> None:
    logits = logits_of(5, 0, 1200)[None, :]
    for filters in ({}, {"top_k": 5}, {"top_p": 0.999}):
        for temperature in (1e-300, 1e-40, 1e-5):
            rows = plain(1, temperature=temperature, **filters)
            assert [drawn.token_ids for drawn in everywhere(logits, rows)] == [[int(logits.argmax())]] * 3
        (warm,) = {tuple(drawn.token_ids) for drawn in everywhere(logits, plain(1, temperature=100.0, **filters))}
        assert 0 <= warm[0] < 1200


def test_noise_is_at_the_position_of_the_token() -> None:
    """Where the output began does not matter, so that a generation can be cut anywhere: fork, resume, next turn."""
    logits = np.zeros((20, 900), np.float32)
    program = SamplingProgram(temperature=1.0, seed=5)
    by_start = [sampling.draw(logits, [Row(program, range(30), start, 0)] * 20) for start in (0, 10, 30)]
    assert by_start[0] == by_start[1] == by_start[2]
    per_choice = sampling.draw(logits, [Row(program, range(30), 0, choice) for choice in range(20)])
    per_position = sampling.draw(logits, [Row(program, range(position), 0, 0) for position in range(20)])
    assert min(len(set(drawn.token_ids)) for drawn in (per_choice, per_position)) > 15


@pytest.fixture
def planted() -> Iterator[None]:
    failpoints.configure({"FERMATA_PLANT": "noise_by_output_offset"}, testing=True)
    yield
    failpoints.configure({}, testing=False)


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("filters", [{}, {"top_k": 800}])
def test_the_planted_bug_draws_by_the_offset(filters: dict[str, Any]) -> None:
    logits = np.zeros((10, 900), np.float32)
    program = SamplingProgram(temperature=1.0, **filters)
    wrong = sampling.draw(logits, [Row(program, range(100 + i), 100, 0) for i in range(10)]).token_ids
    failpoints.configure({}, testing=False)
    assert wrong == sampling.draw(logits, [Row(program, range(i), 0, 0) for i in range(10)]).token_ids
    assert wrong != sampling.draw(logits, [Row(program, range(100 + i), 100, 0) for i in range(10)]).token_ids


def test_log_probabilities_are_raw_and_only_where_asked() -> None:
    """Before bias, temperature and filters; the chosen token has one even if it is not among the top."""
    logits = np.stack([logits_of(seed, 1, 700) for seed in range(4)])
    biased = SamplingProgram(temperature=0.5, top_k=3, logit_bias={11: 100.0})
    rows = [
        Row(SamplingProgram(), [], 0, 0),
        Row(biased, [], 0, 0, logprobs=True),
        Row(biased, [], 0, 0, top_logprobs=5),
        Row(SamplingProgram(temperature=1.0), [], 0, 0, logprobs=True, top_logprobs=900),
    ]
    expected = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1).numpy()
    for drawn in everywhere(logits, rows):
        assert math.isnan(drawn.logprobs[0])
        assert drawn.token_ids[1:3] == [11, 11]
        for i in (1, 2, 3):
            assert drawn.logprobs[i] == pytest.approx(expected[i, drawn.token_ids[i]], rel=1e-12)
        assert [len(top) for top in drawn.top] == [0, 0, 5, 700]
        for i in (2, 3):
            order = np.argsort(-logits[i], kind="stable")[: len(drawn.top[i])]
            assert [token_id for token_id, _ in drawn.top[i]] == order.tolist()
            np.testing.assert_allclose([value for _, value in drawn.top[i]], expected[i, order], rtol=1e-12)
        assert isinstance(drawn.top[2][0][0], int)


def test_no_rows_and_other_dtypes() -> None:
    assert sampling.draw(np.zeros((0, 9), np.float32), []) == ([], [], [])
    with torch.inference_mode():
        assert sampling.draw(torch.zeros(1, 9), plain(1)).token_ids == [0]
    for wrong in (np.zeros((1, 9)), torch.zeros((1, 9), dtype=torch.float16)):
        with pytest.raises(TypeError, match="want float32"):
            sampling.draw(wrong, plain(1))
