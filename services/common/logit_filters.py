"""Order, scores and filters of logits: the arithmetic of R22 from temperature to min-p, on arrays alone.

All functions work on any array-API library `xp`, and on each row by itself, whatever the others are.
Knows nothing of requests, edits, noise and choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import array_api_compat

from services.common.types import SamplingProgram

Array: TypeAlias = Any
"""An array of any array-API library; there is no common static type for them."""

BLOCK = 512
"""Ids per block: of the two-level draw, and of every sum over a vocabulary."""

_NOTHING = -700.0
"""Scores are not let below: exp of this is lost in any sum with the exp(0) of the best, and slow further down."""

PART = 1 << 15
"""Elements that are computed at a time: temporaries of this many float64 stay in the cache and need no fresh pages."""


def first(xp: Any, logits: Array, count: int) -> Array:
    """Ids of the first tokens of each row in order: logit descending, id ascending.

    Sorts integers that hold the logit in their upper and the id in their lower half. No two are equal, so that any
    algorithm of any library gives the same order, ties included.

    Args:
        xp: array library.
        logits: [R, V] float32.
        count: at most V.

    Returns:
        [R, count] int64.
    """
    bits = (0.0 - logits).view(xp.int32)  # of the negated logits; of 0.0 for both zeros
    bits ^= (bits >> 31) & 0x7FFFFFFF  # as integers in the order of the floats
    keys = xp.astype(bits, xp.int64)
    keys <<= 32
    keys |= xp.arange(logits.shape[-1], device=array_api_compat.device(logits))
    if count < logits.shape[-1]:
        if array_api_compat.is_numpy_namespace(xp):
            keys = xp.partition(keys, count - 1, axis=-1)[:, :count]
        elif array_api_compat.is_torch_namespace(xp):
            keys = keys.topk(count, dim=-1, largest=False, sorted=False).values
    return xp.sort(keys, axis=-1, stable=False)[:, :count] & 0xFFFFFFFF


def scores(xp: Any, logits: Array, peak: Array, temperature: Array) -> Array:
    """(logit - largest logit of the row) / temperature.

    Args:
        xp: array library.
        logits: [R, n] float32.
        peak: [R, 1] float32, the largest logit of the whole row.
        temperature: [R, 1] float64, above 0.

    Returns:
        [R, n] float64.
    """
    result = xp.astype(logits, xp.float64)
    result -= xp.astype(peak, xp.float64)
    result /= temperature
    return result


def block_masses(xp: Any, logits: Array, peak: Array, temperature: Array) -> Array:
    """Sum of exp(score) over each block of ids.

    The order of the additions is fixed by the blocks, whatever the number of rows and threads.

    Args:
        xp: array library.
        logits: [R, V] float32.
        peak: [R, 1] float32, the largest logit of each row.
        temperature: [R, 1] float64, above 0.

    Returns:
        [R, number of blocks] float64; the last block may be shorter than the others.
    """

    def weights(band: slice, tile: Array) -> Array:
        return xp.exp(xp.maximum(scores(xp, tile, peak[band], temperature[band]), _NOTHING))

    return _by_blocks(xp, logits, weights)


def rough_block_masses(xp: Any, logits: Array, peak: Array, temperature: Array) -> Array:
    """`block_masses` in float32, at a third of the cost.

    Logarithms of masses above e^-80 are off by less than 1e-4: a score of at most 100 by a few roundings, 2e-5, and the
    sum of 512 weights by 3e-5 of itself.
    """
    inverse = xp.astype(1.0 / temperature, xp.float32)

    def weights(band: slice, tile: Array) -> Array:
        difference = tile - peak[band]
        difference *= inverse[band]
        return xp.exp(difference)

    return _by_blocks(xp, logits, weights)


def total_mass(xp: Any, logits: Array, peak: Array, temperature: Array) -> Array:
    """The normaliser Z: sum of exp(score) over the row, [R, 1] float64. Arguments as those of `block_masses`."""
    return xp.sum(block_masses(xp, logits, peak, temperature), axis=-1, keepdims=True)


def survivors(xp: Any, scores_in_order: Array, total: Array | float, programs: Sequence[SamplingProgram]) -> Array:
    """Top-k, top-p (Holtzman et al. 2019) and min-p (Nguyen et al. 2024), as a mask.

    Each filter keeps a beginning of the order, and so do all together. Ids that are banned are the caller's business.

    Args:
        xp: array library.
        scores_in_order: [R, n] float64, the first n of each row, the best one 0.
        total: [R, 1] float64, `total_mass` of the whole rows; not looked at where top_p is 1.
        programs: R of them.

    Returns:
        [R, n] bool.
    """
    device, count = array_api_compat.device(scores_in_order), scores_in_order.shape[-1]
    columns = [[[float(p.top_k or count), p.top_p, p.min_p] for p in programs]]
    top_k, top_p, min_p = xp.permute_dims(xp.asarray(columns, dtype=xp.float64, device=device), (2, 1, 0))
    weights = xp.exp(scores_in_order)
    sums = xp.cumulative_sum(weights, axis=-1)
    before = xp.concat([xp.zeros_like(sums[:, :1]), sums[:, :-1]], axis=-1)
    rank = xp.arange(count, device=device)[None, :]
    return (rank < top_k) & ((before < top_p * total) | (top_p == 1.0)) & (weights >= min_p)


def _by_blocks(xp: Any, logits: Array, weights: Callable[[slice, Array], Array]) -> Array:
    """Sums of `weights(rows, logits of a tile)` over each block of columns, tile by tile."""
    rows, vocabulary_size = logits.shape
    height = max(1, PART // vocabulary_size)
    bands = []
    for top in range(0, rows, height):
        band = slice(top, top + height)
        tiles = (logits[band, left : left + PART] for left in range(0, vocabulary_size, PART))
        bands.append(xp.concat([_block_sums(xp, weights(band, tile)) for tile in tiles], axis=-1))
    return xp.concat(bands)


def _block_sums(xp: Any, weights: Array) -> Array:
    """Sums of blocks of columns."""
    rows, columns = weights.shape
    whole = columns // BLOCK * BLOCK
    sums = xp.sum(xp.reshape(weights[:, :whole], (rows, whole // BLOCK, BLOCK)), axis=-1)
    if whole == columns:
        return sums
    return xp.concat([sums, xp.sum(weights[:, whole:], axis=-1, keepdims=True)], axis=-1)
