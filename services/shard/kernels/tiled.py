"""Operations of serving: plain torch in fixed tiles over the pages of the KV cache.

The cache's dtype is what is computed in. In bfloat16 the rows of a product are rounded to it, as the weights and the
pages are; everything that comes out is float32, and so are norms, scores and softmax.

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
- Everything else is elementwise and made of operations that IEEE 754 rounds exactly, and of `exp` and `tanh`, which
  were the same at every place of every length. (`silu` and `sigmoid` were not: their vector body and scalar tail
  differ.)

On CUDA a library chooses its kernel by the sizes alone, so products are not sliced; they have one size of row tiles,
and a fixed number of pages (`Tiling.launch`).

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
from services.shard.models.architecture import Activation

VERSION = "tiled-2"
"""Changes whenever this file may give other bits than before; part of the fingerprint (R20)."""

INNER_SLICE = 256
"""Columns of a row that one matrix product takes; a longer K is added up in slices of this size. MKL was seen to split
K = 384 between eight threads and K = 512 between three, which changes the order of the additions; 256 it did not."""

_CUBIC, _ROOT = 0.044715, math.sqrt(2.0 / math.pi)


def pack(weight: Tensor) -> Tensor:
    """What `linear` is fastest with: on the CPU [N, K] in the memory order [K, N], in which products with few rows are
    up to three times as fast, and in float32, as torch gives no float32 result of bfloat16 products there."""
    return weight if weight.is_cuda else weight.float().t().contiguous().t()


def multiply_tile(rows: Tensor, columns: Tensor, output: Tensor) -> None:
    """Writes `rows @ columns` ([tile, K], [K, N]) to `output`, float32 [tile, N]."""
    inner = columns.shape[0]
    if rows.dtype != output.dtype:
        torch.mm(rows, columns, out_dtype=output.dtype, out=output)
        return
    if inner <= INNER_SLICE or rows.is_cuda:
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

    def linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Operations.linear`; the weight comes from `pack`."""
        columns = weight.t()
        output = rows.new_empty(rows.shape[0], columns.shape[1])
        rows = rows.to(self._cache.dtype).to(columns.dtype)
        for first, last in row_tiles(rows.shape[0], self._tiling.rows):
            multiply_tile(rows[first:last], columns, output[first:last])
        return output if bias is None else output.add_(bias)

    def rms_norm(self, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """See `Operations.rms_norm`."""
        return functional.rms_norm(rows, weight.shape, weight, epsilon)

    def rotary(self, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """See `Operations.rotary`."""
        swapped = torch.roll(heads, heads.shape[-1] // 2, -1).mul_(sine.unsqueeze(-2))
        return (heads * cosine.unsqueeze(-2)).add_(swapped)

    def gate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """See `Operations.gate`; written out because `silu` rounds differently at different places."""
        gate, up = gate_up.chunk(2, dim=-1)
        if activation is Activation.SILU:
            denominator = torch.neg(gate).exp_().add_(1.0)
            return torch.div(gate, denominator, out=denominator).mul_(up)
        inner = (gate * gate).mul_(gate).mul_(_CUBIC).add_(gate).mul_(_ROOT)  # Hendrycks and Gimpel 2016
        return inner.tanh_().add_(1.0).mul_(gate).mul_(0.5).mul_(up)

    def softcap(self, values: Tensor, cap: float) -> Tensor:
        """See `Operations.softcap`; in place."""
        return values.div_(cap).tanh_().mul_(cap)

    def attention(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """See `Operations.attention`; keys and values go to their pages before anything is read."""
        plan = self._plan
        self._cache.write(layer, plan.blocks, plan.slots, key[: plan.row_count], value[: plan.row_count])
        query, layout = query * scale, plan.layouts[window]
        mixed = [self._attend(group, query, layer, softcap) for group in layout.groups]
        return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).index_select(0, layout.output_rows)

    def _attend(self, group: TileGroup, query: Tensor, layer: int, softcap: float | None) -> Tensor:
        """Attention of one group of T tiles of Q queries with N items: [P, heads, D] gives [T * Q, heads * D]."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        kv_heads, size, page = keys.shape[1:]
        items, queries = group.blocks.shape[0], group.queries
        width = query.shape[1] // kv_heads  # query heads that share a kv head
        tile = query.index_select(0, group.rows).view(items, queries, kv_heads, width, size)
        tile = tile.transpose(1, 2).reshape(items * kv_heads, queries * width, size)
        scores = self._multiply_pages(tile, keys.index_select(0, group.blocks).view(-1, size, page))
        if softcap is not None:
            scores = self.softcap(scores, softcap)
        partial = scores.view(items, kv_heads, queries, width, page)[: group.hidden.shape[0]]
        partial.masked_fill_(group.hidden, -torch.inf)

        # A maximum has no order: all pages of a tile at once.
        maxima = scores.amax(-1).view(items, -1)
        maxima = maxima.index_select(0, group.tile_items).view(group.tiles, -1, maxima.shape[1]).amax(1)
        weights = scores.view(items, -1, page).sub_(maxima.index_select(0, group.item_tiles).unsqueeze(-1)).exp_()
        weights = weights.view(scores.shape)

        mixed = self._multiply_pages(weights, values.index_select(0, group.blocks).view(-1, page, size))
        mixed, total = _add_ranks(mixed, group, kv_heads), _add_ranks(weights.sum(-1), group, kv_heads)
        mixed = mixed.div_(total.unsqueeze(-1)).view(group.tiles, kv_heads, queries, width, size)
        return mixed.transpose(1, 2).reshape(group.tiles * queries, -1)

    def _multiply_pages(self, left: Tensor, right: Tensor) -> Tensor:
        """Products of float32 matrices with pages, float32."""
        right, count, launch = right.float(), left.shape[0], self._tiling.launch
        if not launch:
            return torch.bmm(left, right)
        left, right = (functional.pad(part, (0, 0, 0, 0, 0, -count % launch)) for part in (left, right))
        launches = [slice(first, first + launch) for first in range(0, len(left), launch)]
        return torch.cat([torch.bmm(left[part], right[part]) for part in launches])[:count]


def _add_ranks(parts: Tensor, group: TileGroup, kv_heads: int) -> Tensor:
    """Adds up the pages of each tile, one after the other: [N * kv_heads, ...] gives [T * kv_heads, ...]."""
    total, *others = parts.split_with_sizes([count * kv_heads for count in group.rank_sizes])
    for other in others:
        total.narrow(0, 0, other.shape[0]).add_(other)
    return total
