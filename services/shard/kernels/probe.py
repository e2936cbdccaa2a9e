"""Finds out which tile sizes give the bits of the standard ones on this machine.

The standard tiles (32 rows, 16 queries) define what a row's result is. A BLAS mostly adds up a row's products in the
same order for other numbers of rows, too, but promises nothing: on the machines seen so far only products with one to
three rows differed. So each other size is tried once at start on random numbers of the very shapes of the model, with
the threads that will be used, and taken only if all bits are equal. A size that is refused costs time, never bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from services.shard.kernels.plan import Tiling
from services.shard.kernels.tiled import multiply_tile

STANDARD_ROWS = 32
STANDARD_QUERIES = 16
_OTHER_ROWS = (128, 8, 4)
_SMALL_QUERIES = (1, 2, 4, 8)
_PAGES = 12
_CUDA_ROWS, _CUDA_ITEMS, _CUDA_LAUNCH = 64, 1024, 512
"""There every call costs as much as a large tile, so that there is one size for all and nothing to find out."""
_ROUND_BYTES = 8 << 20
"""What one round of attention may take. Less costs calls; more brought nothing, and with long contexts takes memory."""


def find_tiling(weights: Iterable[Tensor], *, kv_heads: int, group: int, head_size: int, block_size: int) -> Tiling:
    """Chooses the tile sizes of a model.

    Args:
        weights: packed matrices [N, K] of all linear layers; one of each shape is tried.
        kv_heads: heads of keys and values.
        group: query heads that share one of them.
        head_size: D.
        block_size: positions per page.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {tuple(weight.shape): weight for weight in weights}
    if any(weight.is_cuda for weight in shapes.values()):
        return Tiling(rows=(_CUDA_ROWS,), queries=(STANDARD_QUERIES,), items=_CUDA_ITEMS, launch=_CUDA_LAUNCH)
    others = [size for size in _OTHER_ROWS if all(_rows_agree(weight, size, generator) for weight in shapes.values())]
    small = next((size for size in _SMALL_QUERIES if _queries_agree(size * group, group, head_size, block_size)), None)
    item_bytes = 4 * kv_heads * block_size * (2 * head_size + STANDARD_QUERIES * group)  # pages and scores
    return Tiling(
        rows=tuple(sorted([STANDARD_ROWS, *others], reverse=True)),
        queries=(STANDARD_QUERIES,) if small is None else (STANDARD_QUERIES, small),
        items=max(8, _ROUND_BYTES // item_bytes),
    )


def _rows_agree(weight: Tensor, size: int, generator: torch.Generator) -> bool:
    """Whether products in tiles of `size` rows are those in standard tiles."""
    count = max(size, STANDARD_ROWS)
    rows = torch.randn(count, weight.shape[1], generator=generator)
    return torch.equal(_multiply(rows, weight, size), _multiply(rows, weight, STANDARD_ROWS))


def _multiply(rows: Tensor, weight: Tensor, size: int) -> Tensor:
    output = rows.new_empty(len(rows), weight.shape[0])
    for first in range(0, len(rows), size):
        multiply_tile(rows[first : first + size], weight.t(), output[first : first + size])
    return output


def _queries_agree(height: int, group: int, head_size: int, block_size: int) -> bool:
    """Whether both products of attention with `height` rows are those with the rows of a standard query tile."""
    generator = torch.Generator().manual_seed(0)
    standard = STANDARD_QUERIES * group
    queries = torch.randn(_PAGES, standard, head_size, generator=generator)
    keys = torch.randn(_PAGES, head_size, block_size, generator=generator)
    values = torch.randn(_PAGES, block_size, head_size, generator=generator)
    for left, right in ((queries, keys), (torch.bmm(queries, keys), values)):
        expected = torch.bmm(left, right)
        for count in (1, _PAGES):
            for first in range(0, standard - height + 1, height):
                part = torch.bmm(left[:count, first : first + height].contiguous(), right[:count])
                if not torch.equal(part, expected[:count, first : first + height]):
                    return False
    return True
