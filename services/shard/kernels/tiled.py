"""Operations of serving: plain torch in fixed tiles over the pages of the KV cache, float32.

The promise is R23: **a row is a function of its input and the weights alone**, bit for bit, not of who else is in the
batch, how a prompt was cut into steps, prefill or decode, the blocks that were used, or the number of threads. Each
operation keeps it in its own way:

- A matrix product is computed in row tiles of fixed sizes, over K in slices of fixed size. (A BLAS chooses its kernel,
  and with several threads the split of a long K, by the number of rows.) Smaller and larger tiles than the standard
  one are used where `probe.py` has seen them give the same bits.
- Attention is computed in items of one query tile and one page (`plan.py`); partial results of pages are added one
  after the other.
- Sums over a row's own elements (norms, softmax) are sums along the contiguous last dimension, whose order depends on
  its length only.
- Everything else is elementwise and made of operations that IEEE 754 rounds exactly, and of `exp`, which was the same
  at every place of every length. (`silu` and `sigmoid` are not: their vector body and scalar tail differ.)

Knows no model: which operations follow each other is the business of `models/`.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

from services.shard.kernels.plan import StepPlan, TileGroup, Tiling
from services.shard.kv_cache import KeyValueCache

VERSION = "tiled-1"
"""Changes whenever this file may give other bits than before; part of the fingerprint (R20)."""

INNER_SLICE = 256
"""Columns of a row that one matrix product takes; a longer K is added up in slices of this size. MKL was seen to split
K = 384 between eight threads and K = 512 between three, which changes the order of the additions; 256 it did not."""


def pack(weight: Tensor) -> Tensor:
    """Gives a matrix [N, K] the memory order [K, N], in which products with few rows are up to three times as fast."""
    return weight.t().contiguous().t()


def multiply_tile(rows: Tensor, columns: Tensor, output: Tensor) -> None:
    """Writes `rows @ columns` ([tile, K], [K, N]) to `output` [tile, N]."""
    inner = columns.shape[0]
    if inner <= INNER_SLICE:
        torch.mm(rows, columns, out=output)
        return
    torch.mm(rows[:, :INNER_SLICE], columns[:INNER_SLICE], out=output)
    for first in range(INNER_SLICE, inner, INNER_SLICE):
        output.addmm_(rows[:, first : first + INNER_SLICE], columns[first : first + INNER_SLICE])


@functools.lru_cache(maxsize=4096)
def row_tiles(count: int, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Cuts `count` rows, a multiple of the smallest size, into (first, last) of tiles, largest sizes first."""
    bounds, first = [], 0
    for size in sizes:
        while count - first >= size:
            bounds.append((first, first + size))
            first += size
    return bounds


class TiledOperations:
    """`Operations` of one step over rows [P, ...], as `StepPlan` lays them out."""

    def __init__(self, plan: StepPlan, cache: KeyValueCache, tiling: Tiling) -> None:
        self._plan, self._cache, self._tiling = plan, cache, tiling

    def linear(self, rows: Tensor, weight: Tensor) -> Tensor:
        """See `Operations.linear`; fastest with a weight from `pack`."""
        columns = weight.t()
        output = rows.new_empty(rows.shape[0], columns.shape[1])
        for first, last in row_tiles(rows.shape[0], self._tiling.rows):
            multiply_tile(rows[first:last], columns, output[first:last])
        return output

    def rms_norm(self, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """See `Operations.rms_norm`."""
        return functional.rms_norm(rows, weight.shape, weight, epsilon)

    def rotary(self, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """See `Operations.rotary`."""
        swapped = torch.roll(heads, heads.shape[-1] // 2, -1).mul_(sine.unsqueeze(-2))
        return (heads * cosine.unsqueeze(-2)).add_(swapped)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See `Operations.swiglu`; written out because `silu` rounds differently at different places."""
        gate, up = gate_up.chunk(2, dim=-1)
        denominator = torch.neg(gate).exp_().add_(1.0)
        return torch.div(gate, denominator, out=denominator).mul_(up)

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Operations.attention`; keys and values go to their pages before anything is read."""
        plan = self._plan
        self._cache.write(layer, plan.blocks, plan.slots, key[: plan.row_count], value[: plan.row_count])
        query = query * (1.0 / math.sqrt(query.shape[-1]))
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        mixed = [_attend(group, query, keys, values) for group in plan.groups]
        return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).index_select(0, plan.output_rows)


def _attend(group: TileGroup, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one group of tiles.

    Args:
        group: T tiles of Q queries with N items.
        query: [P, heads, D], scaled.
        keys: pages [blocks, kv_heads, D, page].
        values: pages [blocks, kv_heads, page, D].

    Returns:
        [T * Q, heads * D].
    """
    kv_heads, size, page = keys.shape[1:]
    items, queries = group.blocks.shape[0], group.queries
    width = query.shape[1] // kv_heads  # query heads that share a kv head
    tile = query.index_select(0, group.rows).view(items, queries, kv_heads, width, size)
    tile = tile.transpose(1, 2).reshape(items * kv_heads, queries * width, size)
    scores = torch.bmm(tile, keys.index_select(0, group.blocks).view(-1, size, page))
    partial = scores.view(items, kv_heads, queries, width, page)[: group.hidden.shape[0]]
    partial.masked_fill_(group.hidden, -torch.inf)

    # A maximum has no order: all pages of a tile at once.
    maxima = scores.amax(-1).view(items, -1)
    maxima = maxima.index_select(0, group.tile_items).view(group.tiles, -1, maxima.shape[1]).amax(1)
    weights = scores.view(items, -1, page).sub_(maxima.index_select(0, group.item_tiles).unsqueeze(-1)).exp_()
    weights = weights.view(scores.shape)

    mixed = torch.bmm(weights, values.index_select(0, group.blocks).view(-1, page, size))
    mixed, total = _add_ranks(mixed, group, kv_heads), _add_ranks(weights.sum(-1), group, kv_heads)
    mixed = mixed.div_(total.unsqueeze(-1)).view(group.tiles, kv_heads, queries, width, size)
    return mixed.transpose(1, 2).reshape(group.tiles * queries, -1)


def _add_ranks(parts: Tensor, group: TileGroup, kv_heads: int) -> Tensor:
    """Adds up the pages of each tile, one after the other: [N * kv_heads, ...] gives [T * kv_heads, ...]."""
    total, *others = parts.split_with_sizes([count * kv_heads for count in group.rank_sizes])
    for other in others:
        total.narrow(0, 0, other.shape[0]).add_(other)
    return total
