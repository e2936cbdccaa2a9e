"""The sampling program: from the logits of one step to the tokens of all its rows (R21, R22).

One implementation in array-API style: the shard runs it on what its model gives, the orchestrator on what a shard
sends, and both choose the same tokens. A row's token is a function of its logits and its `Row` alone.

A token is the arg-max of score + Gumbel noise, which is an exact draw from the softmax of the scores (the "Gumbel-max
trick"). Rows are drawn together by how they are drawn:

- greedy (temperature 0): the arg-max of the logits, lowest id first;
- in two levels (no filter): a block of 512 ids by its mass, then a token of it, so that few ids need noise;
- filtered: the first 1024 tokens in order, cut by top-k, top-p and min-p, noise for the survivors only. Where 1024 do
  not decide exactly, the whole row is put in order.

Knows logits, ids and the program; nothing of models, requests, text or gRPC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import array_api_compat
import numpy as np

from services.common import failpoints, logit_edits, logit_filters, noise
from services.common.types import SamplingProgram

Array: TypeAlias = Any
"""An array of any array-API library; there is no common static type for them."""

CANDIDATES = 1024
"""Tokens of a filtered row that are looked at before the whole row is."""

_REACH = noise.LARGEST_GUMBEL - noise.SMALLEST_GUMBEL
"""A score that is this far below the best cannot win, whatever the noise."""

_ROUGHNESS = 1e-3
"""Far above the error of the logarithms of two rough masses."""

_READ = 1 << 20
"""Logits that are gathered at a time where they are only looked through."""


@dataclass(slots=True)
class Row:
    """What the draw of one token needs to know.

    Attributes:
        program: how to choose.
        token_ids: the whole sequence so far; its length is the position of the token to be drawn.
        output_start: position of the first output token of this generation.
        choice: index of the choice within its generation.
        stop_token_ids: cannot be chosen while fewer than `min_tokens` were put out.
        min_tokens: see `stop_token_ids`.
        top_logprobs: number of most probable tokens wanted; implies `logprobs`.
        logprobs: the log-probability of the chosen token is wanted.
    """

    program: SamplingProgram
    token_ids: Sequence[int]
    output_start: int
    choice: int
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    top_logprobs: int = 0
    logprobs: bool = False


class Drawn(NamedTuple):
    """The result of a draw: lists of one entry per row.

    Attributes:
        token_ids: the chosen ids; -1 where a logit is not finite or nothing may be chosen: that sequence alone fails.
        logprobs: raw log-probability of the chosen token, before any edit; NaN where not asked for or failed.
        top: (id, raw log-probability) of the most probable tokens, best first; empty where not asked for or failed.
    """

    token_ids: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]


class Distribution(NamedTuple):
    """The tokens that edits and filters leave, most probable first, and their probabilities, which sum to 1."""

    token_ids: list[int]
    probabilities: list[float]


def draw(logits: Array, rows: Sequence[Row], *, best: Sequence[int] | None = None, xp: Any = None) -> Drawn:
    """Chooses the next token of every row, and gives the log-probabilities that the rows ask for.

    Args:
        logits: [R, V] float32, as the model gives them; not changed.
        rows: R of them.
        best: the id of the largest logit of each row, the lowest such, or -1 where a logit is not finite, if whoever
            computed the logits has it: rows that need no more than that are then not looked at (`reads_logits`).
        xp: array library to compute in, that of `logits`. None takes NumPy for whatever lies in host memory, where a
            tensor can be had as an array without a copy: the calls cost a third of torch's, and no result can depend
            on a number of threads.

    Raises:
        TypeError: the logits are not float32.
    """
    read = [index for index, row in enumerate(rows) if best is None or reads_logits(row)]
    if best is None or len(read) == len(rows):
        return _draw(*_resident(xp, logits), rows)
    drawn = Drawn(list(best), [math.nan] * len(rows), [[] for _ in rows])
    if read:
        xp, logits = _resident(xp, logits)
        part = _draw(xp, logits[xp.asarray(read, device=array_api_compat.device(logits))], [rows[i] for i in read])
        for i, index in enumerate(read):
            drawn.token_ids[index], drawn.logprobs[index] = part.token_ids[i], part.logprobs[i]
            drawn.top[index] = part.top[i]
    return drawn


def reads_logits(row: Row) -> bool:
    """Whether a row's draw needs more of its logits than which one is the largest."""
    greedy = row.program.temperature == 0.0
    return not greedy or row.logprobs or row.top_logprobs > 0 or logit_edits.needed(row)


def _draw(xp: Any, logits: Array, rows: Sequence[Row]) -> Drawn:
    token_ids = [-1] * len(rows)
    with np.errstate(all="ignore"):  # infinities are looked for where they matter, as with torch, which never warns
        for choose, group, indices in _groups(xp, logits, rows):
            for index, token_id in zip(indices, choose(group), strict=True):
                token_ids[index] = token_id
        for index in _not_finite(xp, logits):
            token_ids[index] = -1
        return Drawn(token_ids, *_logprobs(xp, logits, rows, token_ids))


def distribution(logits: Array, row: Row, *, xp: Any = None) -> Distribution:
    """What the next token of one row is drawn from, in order; nothing where `draw` would fail.

    Args:
        logits: [V] float32, as the model gives them; not changed.
        row: whose token it is.
        xp: see `draw`.

    Raises:
        TypeError: the logits are not float32.
    """
    xp, logits = _resident(xp, logits[None, :])
    with np.errstate(all="ignore"):
        if _not_finite(xp, logits):
            return Distribution([], [])
        ((choose, group, _),) = _groups(xp, logits, [row])
        if choose is _greedy:
            (token_id,) = _greedy(group)
            return Distribution([token_id], [1.0]) if token_id >= 0 else Distribution([], [])
        token_ids, scores, kept = _candidates(group, logits.shape[-1])
        weights = xp.exp(scores[kept])
        return Distribution(token_ids[kept].tolist(), (weights / xp.sum(weights)).tolist())


def draws_in_two_levels(program: SamplingProgram) -> bool:
    """Whether the draw has two levels (R22): a temperature above 0, no filter and no list of allowed ids."""
    return (
        program.temperature > 0.0
        and program.top_k == 0
        and program.top_p == 1.0
        and program.min_p == 0.0
        and program.allowed_token_ids is None
    )


@dataclass(slots=True)
class _Group:
    """Rows that are drawn in the same way.

    Attributes:
        xp: array library.
        logits: [S, V], among them those of the group.
        members: which of S, ascending.
        rows: the R rows themselves, in the same order.
        noise_by_output_offset: a planted bug.
    """

    xp: Any
    logits: Array
    members: list[int]
    rows: list[Row]
    noise_by_output_offset: bool = False

    def integers(self, values: Sequence[int]) -> Array:
        """int64 array beside the logits."""
        return self.xp.asarray(values, dtype=self.xp.int64, device=array_api_compat.device(self.logits))

    def temperatures(self) -> Array:
        """[R, 1] float64."""
        values = [[row.program.temperature] for row in self.rows]
        return self.xp.asarray(values, dtype=self.xp.float64, device=array_api_compat.device(self.logits))

    def addresses(self) -> Array:
        """Where the noise of the rows is, but for the token: [4, R] of low and high seed, position, choice."""
        seeds = [noise.split_seed(row.program.seed) for row in self.rows]
        positions = [len(row.token_ids) for row in self.rows]
        if self.noise_by_output_offset:
            positions = [len(row.token_ids) - row.output_start for row in self.rows]
        low, high = zip(*seeds, strict=True)
        words = [*low, *high, *positions, *(row.choice for row in self.rows)]
        return self.xp.reshape(self.integers(words), (4, len(self.rows)))

    def parts(self, elements: int) -> Iterator[tuple[slice, Array]]:
        """The group in parts: which of its rows, and their logits [r, V], about so many elements at a time."""
        step = max(1, elements // self.logits.shape[-1])
        for start in range(0, len(self.members), step):
            members = self.members[start : start + step]
            is_range = members[-1] - members[0] + 1 == len(members)  # a view then, else a copy
            where = slice(members[0], members[-1] + 1) if is_range else self.integers(members)
            yield slice(start, start + step), self.logits[where]

    def only(self, i: int) -> _Group:
        """The group of its row i."""
        return _Group(self.xp, self.logits, [self.members[i]], [self.rows[i]], self.noise_by_output_offset)


_Chooser: TypeAlias = Callable[[_Group], list[int]]


def _groups(xp: Any, logits: Array, rows: Sequence[Row]) -> Iterator[tuple[_Chooser, _Group, list[int]]]:
    """The rows by how they are drawn, with their indices; those with edits apart, on an edited copy of their logits."""
    planted = failpoints.planted("noise_by_output_offset")
    edited = [index for index, row in enumerate(rows) if logit_edits.needed(row)]
    place = {index: i for i, index in enumerate(edited)}
    kinds: dict[tuple[_Chooser, bool], list[int]] = {}
    for index, row in enumerate(rows):
        kinds.setdefault((_chooser(row.program), index in place), []).append(index)
    if edited:
        copies = logits[xp.asarray(edited, device=array_api_compat.device(logits))]
        logit_edits.apply(copies, [rows[index] for index in edited])
    for (choose, edit), indices in kinds.items():
        members = [place[index] for index in indices] if edit else indices
        yield choose, _Group(xp, copies if edit else logits, members, [rows[i] for i in indices], planted), indices


def _chooser(program: SamplingProgram) -> _Chooser:
    if program.temperature == 0.0:
        return _greedy
    return _two_levels if draws_in_two_levels(program) else _filtered


def _greedy(group: _Group) -> list[int]:
    """The largest logit of each row, lowest id first; -1 where it is not finite."""
    xp = group.xp
    result: list[int] = []
    for _, logits in group.parts(_READ):
        best = xp.argmax(logits, axis=-1, keepdims=True)
        possible = xp.isfinite(xp.take_along_axis(logits, best, axis=-1))
        result += xp.where(possible, best, -1)[:, 0].tolist()
    return result


def _two_levels(group: _Group) -> list[int]:
    """A block by its mass, then a token of it; -1 where the largest logit is not finite."""
    xp, vocabulary_size, device = group.xp, group.logits.shape[-1], array_api_compat.device(group.logits)
    temperatures, address = group.temperatures(), group.addresses()[:, :, None]
    peak, start = _blocks(group, temperatures, address)
    # The last block may be short: its last token stands again for those that are missing, and wins at its own place.
    token_ids = xp.minimum(start + xp.arange(logit_filters.BLOCK, device=device), vocabulary_size - 1)
    rows = group.integers(group.members)[:, None] * vocabulary_size
    logits = xp.reshape(group.logits, (-1,))[rows + token_ids]
    chances = logit_filters.scores(xp, logits, peak, temperatures)
    chances += _noise(xp, address, token_ids, noise.TOKEN_PURPOSE)
    best = start + xp.argmax(chances, axis=-1, keepdims=True)
    result: list[int] = xp.where(xp.isfinite(peak), best, -1)[:, 0].tolist()
    return result


def _blocks(group: _Group, temperatures: Array, address: Array) -> tuple[Array, Array]:
    """The largest logit of each row and the first id of the block that is chosen, [R, 1] each.

    The choice is that by exact masses. Rough ones decide wherever the best block leads by far more than their error;
    for the few other rows the exact ones are computed.
    """
    xp = group.xp
    peaks, masses = [], []
    for part, logits in group.parts(_READ):
        peaks.append(xp.max(logits, axis=-1, keepdims=True))
        masses.append(logit_filters.rough_block_masses(xp, logits, peaks[-1], temperatures[part]))
    peak, mass = xp.concat(peaks), xp.concat(masses)

    indices = xp.broadcast_to(xp.arange(mass.shape[-1], device=array_api_compat.device(mass)), mass.shape)
    gumbel = _noise(xp, address, indices, noise.BLOCK_PURPOSE)
    chances = xp.log(xp.astype(mass, xp.float64)) + gumbel
    block = xp.argmax(chances, axis=-1, keepdims=True)
    rivals = xp.sum(xp.astype(chances > xp.max(chances, axis=-1, keepdims=True) - _ROUGHNESS, xp.int64), axis=-1)
    for i in xp.nonzero(rivals != 1)[0].tolist():  # 0 if a chance is not a number
        ((_, logits),) = group.only(i).parts(_READ)
        mass = logit_filters.block_masses(xp, logits, peak[i : i + 1], temperatures[i : i + 1])
        block[i] = xp.argmax(xp.log(mass) + gumbel[i : i + 1], axis=-1)
    return peak, block * logit_filters.BLOCK


def _filtered(group: _Group) -> list[int]:
    """A survivor of the filters; -1 where there is none."""
    vocabulary_size, limits = group.logits.shape[-1], [row.program.top_k for row in group.rows]
    count = min(max(limit if 0 < limit < CANDIDATES else CANDIDATES for limit in limits), vocabulary_size)
    result, decided = _choose_among(group, count)
    for i, limit in enumerate(limits):
        if not (decided[i] or 0 < limit <= count or count == vocabulary_size):
            result[i : i + 1], _ = _choose_among(group.only(i), vocabulary_size)
    return result


def _choose_among(group: _Group, count: int) -> tuple[list[int], list[bool]]:
    """A survivor among the first `count` tokens of each row, and whether later ones could not have been chosen."""
    xp = group.xp
    token_ids, scores, kept = _candidates(group, count)
    contenders = kept & (scores >= -_REACH)
    decided: list[bool] = xp.logical_not(contenders[:, -1]).tolist()
    width = max(1, int(xp.max(xp.count_nonzero(contenders, axis=-1))))  # they stand before all others
    token_ids, scores, contenders = token_ids[:, :width], scores[:, :width], contenders[:, :width]

    members, ranks = xp.nonzero(contenders)
    ids = token_ids[members, ranks]
    chances = xp.full(scores.shape, -xp.inf, dtype=xp.float64, device=array_api_compat.device(scores))
    chances[members, ranks] = scores[members, ranks] + _noise(
        xp, group.addresses()[:, members], ids, noise.TOKEN_PURPOSE
    )
    best = xp.take_along_axis(token_ids, xp.argmax(chances, axis=-1, keepdims=True), axis=-1)
    return xp.where(kept[:, :1], best, -1)[:, 0].tolist(), decided


def _candidates(group: _Group, count: int) -> tuple[Array, Array, Array]:
    """The first tokens of each row in order: logit descending, id ascending.

    Returns:
        Ids, scores and whether each survives, [R, count] each. Survivors stand before all others.
    """
    xp, temperatures = group.xp, group.temperatures()
    found = []
    for part, logits in group.parts(logit_filters.PART):
        programs = [row.program for row in group.rows[part]]
        token_ids = logit_filters.first(xp, logits, count)
        ordered = xp.take_along_axis(logits, token_ids, axis=-1)
        peak = ordered[:, :1]
        scores = logit_filters.scores(xp, ordered, peak, temperatures[part])
        total: Array | float = math.nan
        if any(program.top_p < 1.0 for program in programs):
            total = logit_filters.total_mass(xp, logits, peak, temperatures[part])
        kept = logit_filters.survivors(xp, scores, total, programs) & xp.isfinite(ordered) & xp.isfinite(peak)
        found.append((token_ids, scores, kept))
    token_ids, scores, kept = (xp.concat(arrays) for arrays in zip(*found, strict=True))
    return token_ids, scores, kept


def _noise(xp: Any, address: Array, token_ids: Array, purpose: int) -> Array:
    """Noise of `token_ids`, [R] or [R, n]; `address` is [4, R] or [4, R, 1], as from `_Group.addresses`."""
    low, high, position, choice = address
    height = max(1, logit_filters.PART // math.prod(token_ids.shape[1:]))
    tiles = [slice(top, top + height) for top in range(0, token_ids.shape[0], height)] or [slice(0)]
    parts = [noise.gumbel((token_ids[t], position[t], choice[t], purpose), (low[t], high[t])) for t in tiles]
    return parts[0] if len(parts) == 1 else xp.concat(parts)


def _logprobs(
    xp: Any, logits: Array, rows: Sequence[Row], token_ids: list[int]
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Raw log-probabilities of the chosen and of the most probable tokens, where they are wanted."""
    logprobs = [math.nan] * len(rows)
    top: list[list[tuple[int, float]]] = [[] for _ in rows]
    wanted = [i for i, row in enumerate(rows) if (row.logprobs or row.top_logprobs) and token_ids[i] >= 0]
    group = _Group(xp, logits, wanted, [rows[i] for i in wanted])
    for part, some in group.parts(logit_filters.PART):
        members = wanted[part]
        peak = xp.max(some, axis=-1, keepdims=True)
        one = xp.ones(peak.shape, dtype=xp.float64, device=array_api_compat.device(peak))
        log_total = xp.log(logit_filters.total_mass(xp, some, peak, one))
        ids = group.integers([token_ids[i] for i in members])[:, None]
        if most := min(max(rows[i].top_logprobs for i in members), some.shape[-1]):
            ids = xp.concat([ids, logit_filters.first(xp, some, most)], axis=-1)
        values = logit_filters.scores(xp, xp.take_along_axis(some, ids, axis=-1), peak, one) - log_total
        for i, row_ids, row_values in zip(members, ids.tolist(), values.tolist(), strict=True):
            logprobs[i] = row_values[0]
            top[i] = list(zip(row_ids[1:], row_values[1:], strict=True))[: rows[i].top_logprobs]
    return logprobs, top


def _not_finite(xp: Any, logits: Array) -> list[int]:
    """Rows with a logit that is NaN or infinite: the largest or the smallest is then."""
    finite = xp.isfinite(xp.max(logits, axis=-1)) & xp.isfinite(xp.min(logits, axis=-1))
    result: list[int] = [] if xp.all(finite) else xp.nonzero(xp.logical_not(finite))[0].tolist()
    return result


def _resident(xp: Any, logits: Array) -> tuple[Any, Array]:
    """The library to compute in, and the logits as an array of it."""
    if xp is None and array_api_compat.is_torch_array(logits) and logits.device.type == "cpu":
        logits = np.asarray(logits)
    xp = xp or array_api_compat.array_namespace(logits)
    if logits.dtype != xp.float32:
        raise TypeError(f"logits are {logits.dtype}, want float32")
    return xp, logits
