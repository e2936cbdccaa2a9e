"""Where everything of a step lies: index arrays from a batch, made with a few NumPy calls whatever the batch.

Attention works on **items**: one page of keys met by one tile of queries. A decoding sequence is a tile with one
query, a prompt is a row of tiles of 16; each has as many items as pages lie before it, so that nobody pays for the
longest context of the batch. The items of a group are laid out by rank: rank 0 holds the last page of every tile,
rank 1 the page before it, and so on. Tiles are sorted by their number of pages, hence the tiles that have a page of
some rank are the first ones, and adding up the pages of all tiles is one addition per rank over contiguous slices.
A query's pages are added in the order from its own back to the first, whatever else is in the tile or the batch; a
page that lies behind a query adds exact zeros (R23).

Knows block tables and counts; nothing of models or kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from services.shard.scheduler import Batch

Integers = NDArray[np.int64]


class Tiling(NamedTuple):
    """Sizes that work is cut into; which of them give equal bits is found out by `probe.py`.

    Attributes:
        rows: row tiles of linear layers, largest first; each divides the one before it.
        queries: query tiles of attention, largest first.
        items: items of attention that are computed in one round; a single tile may have more.
    """

    rows: tuple[int, ...] = (32,)
    queries: tuple[int, ...] = (16,)
    items: int = 128


@dataclass(frozen=True, slots=True)
class TileGroup:
    """Query tiles of one size that are computed together.

    Attributes:
        tiles: number of tiles, T.
        queries: queries in a tile, Q; a tile with fewer repeats its last one.
        rank_sizes: number of tiles that have a page of each rank; they sum up to the number of items, N.
        rows: int64 [N * Q], row of each query of each item.
        blocks: int64 [N], block of each item's page.
        item_tiles: int64 [N], tile of each item.
        tile_items: int64 [T * ranks], items of each tile; a tile with fewer pages repeats its last one.
        hidden: bool [M, 1, Q, 1, block_size], keys that lie behind the query; beyond the first M items there are none.
    """

    tiles: int
    queries: int
    rank_sizes: list[int]
    rows: Tensor
    blocks: Tensor
    item_tiles: Tensor
    tile_items: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Index tensors of one step.

    Attributes:
        row_count: rows that are tokens, R; what follows up to the padded number P is computed for nobody.
        token_ids: int64 [P].
        positions: int64 [P].
        blocks: int64 [R], block that takes the row's key and value.
        slots: int64 [R], place in that block.
        groups: the query tiles.
        output_rows: int64 [P], where each row's query lies in the concatenated tiles of all groups.
        drawn_rows: int64, rows whose logits are wanted, padded like P.
        drawn_count: how many of them there are.
    """

    row_count: int
    token_ids: Tensor
    positions: Tensor
    blocks: Tensor
    slots: Tensor
    groups: list[TileGroup]
    output_rows: Tensor
    drawn_rows: Tensor
    drawn_count: int


class _Tiles(NamedTuple):
    """Query tiles in the making: the sequence, the first row and the number of queries of each."""

    sequences: Integers
    first_rows: Integers
    sizes: Integers


def plan_step(batch: Batch, block_size: int, tiling: Tiling) -> StepPlan:
    """Lays out a batch.

    Args:
        batch: at least one chunk, each with at least one token and a table that covers all of its positions.
        block_size: positions per block.
        tiling: sizes to cut into.
    """
    chunks = batch.chunks
    lengths = np.array([len(chunk.token_ids) for chunk in chunks])
    starts = np.array([chunk.start for chunk in chunks])
    tables = np.fromiter(chain.from_iterable(chunk.block_table for chunk in chunks), np.int64)
    table_offsets = _offsets(np.array([len(chunk.block_table) for chunk in chunks]))
    row_offsets, row_count = _offsets(lengths), int(lengths.sum())

    positions = np.arange(row_count) + np.repeat(starts - row_offsets, lengths)
    blocks = tables[np.repeat(table_offsets, lengths) + positions // block_size]
    token_ids = np.fromiter(chain.from_iterable(chunk.token_ids for chunk in chunks), np.int64, row_count)

    output_rows = np.zeros(_padded(row_count, tiling), np.int64)
    groups, first_slot = [], 0
    for queries, tiles in _cut(lengths, row_offsets, tiling.queries):
        for sequences, first_rows, sizes in _split(tiles, positions, block_size, tiling.items):
            rows = first_rows[:, None] + np.minimum(np.arange(queries), sizes[:, None] - 1)
            output_rows[rows] = first_slot + np.arange(rows.size).reshape(rows.shape)
            first_slot += rows.size
            groups.append(_group(rows, positions, tables, table_offsets[sequences], block_size))

    drawn_rows = (row_offsets + lengths - 1)[[chunk.draws for chunk in chunks]]
    return StepPlan(
        row_count=row_count,
        token_ids=_pad(token_ids, tiling),
        positions=_pad(positions, tiling),
        blocks=torch.from_numpy(blocks),
        slots=torch.from_numpy(positions % block_size),
        groups=groups,
        output_rows=torch.from_numpy(output_rows),
        drawn_rows=_pad(drawn_rows, tiling),
        drawn_count=len(drawn_rows),
    )


def _cut(lengths: Integers, row_offsets: Integers, sizes: tuple[int, ...]) -> Iterator[tuple[int, _Tiles]]:
    """Cuts each chunk into query tiles: large ones, and a small one for a rest that fits it."""
    large, small = sizes[0], sizes[-1]
    full, rest = np.divmod(lengths, large)
    counts = full + (rest > small)
    sequences = np.repeat(np.arange(len(lengths)), counts)
    done = (np.arange(len(sequences)) - np.repeat(_offsets(counts), counts)) * large
    if len(sequences):
        yield large, _Tiles(sequences, row_offsets[sequences] + done, np.minimum(lengths[sequences] - done, large))
    (sequences,) = np.nonzero((rest > 0) & (rest <= small))
    if len(sequences):
        yield small, _Tiles(sequences, (row_offsets + full * large)[sequences], rest[sequences])


def _split(tiles: _Tiles, positions: Integers, block_size: int, items: int) -> Iterator[_Tiles]:
    """Sorts tiles by their number of pages, most first, and splits them where enough items have come together."""
    pages = positions[tiles.first_rows + tiles.sizes - 1] // block_size + 1
    order = np.argsort(-pages, kind="stable")
    before = np.cumsum(pages[order]) - pages[order]
    (bounds,) = np.nonzero(np.diff(before // items, prepend=-1, append=-1))
    for first, last in pairwise(bounds.tolist()):
        part = order[first:last]
        yield _Tiles(*(column[part] for column in tiles))


def _group(
    rows: Integers, positions: Integers, tables: Integers, table_offsets: Integers, block_size: int
) -> TileGroup:
    """Lays out the items of tiles that are sorted by their number of pages.

    Args:
        rows: [T, Q].
        positions: of all rows.
        tables: the block tables of all sequences, one behind the other.
        table_offsets: [T], where the table of each tile's sequence begins.
        block_size: positions per block.
    """
    tiles, queries = rows.shape
    pages = positions[rows[:, -1]] // block_size + 1
    ranks = np.arange(pages[0])
    rank_sizes = tiles - np.searchsorted(pages[::-1], ranks, side="right")
    rank_offsets = _offsets(rank_sizes)
    item_ranks = np.repeat(ranks, rank_sizes)
    item_tiles = np.arange(len(item_ranks)) - rank_offsets[item_ranks]
    item_pages = pages[item_tiles] - 1 - item_ranks
    last_ranks = np.minimum(ranks, pages[:, None] - 1)

    # The queries of a tile lie on so many pages at most; on every page before these all keys are seen.
    partial = rank_sizes[: 1 + -(-(queries - 1) // block_size)].sum()
    keys = item_pages[:partial, None, None] * block_size + np.arange(block_size)
    hidden = keys > positions[rows[item_tiles[:partial]]][:, :, None]
    return TileGroup(
        tiles=tiles,
        queries=queries,
        rank_sizes=rank_sizes.tolist(),
        rows=torch.from_numpy(rows[item_tiles].reshape(-1)),
        blocks=torch.from_numpy(tables[table_offsets[item_tiles] + item_pages]),
        item_tiles=torch.from_numpy(item_tiles),
        tile_items=torch.from_numpy((rank_offsets[last_ranks] + np.arange(tiles)[:, None]).reshape(-1)),
        hidden=torch.from_numpy(hidden[:, None, :, None, :]),
    )


def _offsets(sizes: Integers) -> Integers:
    """Where each of these begins when they lie one behind the other."""
    return np.cumsum(sizes) - sizes


def _padded(count: int, tiling: Tiling) -> int:
    smallest = tiling.rows[-1]
    return -(-count // smallest) * smallest


def _pad(values: Integers, tiling: Tiling) -> Tensor:
    """Fills up with zeros to whole row tiles."""
    padded = np.zeros(_padded(len(values), tiling), np.int64)
    padded[: len(values)] = values
    return torch.from_numpy(padded)
