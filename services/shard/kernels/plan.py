"""Where everything of a step lies: index arrays from a batch, made with a few NumPy calls whatever the batch.

Attention works on **items**: one page of keys met by one tile of queries. A decoding sequence is a tile with one
query, a prompt is a row of tiles of 16; each has as many items as pages lie before it, so that nobody pays for the
longest context of the batch. The items of a group are laid out by rank: rank 0 holds the last page of every tile,
rank 1 the page before it, and so on. Tiles are sorted by their number of pages, hence the tiles that have a page of
some rank are the first ones, and adding up the pages of all tiles is one addition per rank over contiguous slices.
A query's pages are added in the order from its own back to the first, whatever else is in the tile or the batch; a
page that lies behind a query adds exact zeros, and so does one that lies before its window (R23). Hence tiles leave out
the pages that lie before the windows of all of their queries, which changes no bit.

Knows block tables and counts; nothing of models or kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        launch: pages whose products are always computed together, filled up with zeros; 0 takes as many as there are.
    """

    rows: tuple[int, ...] = (32,)
    queries: tuple[int, ...] = (16,)
    items: int = 128
    launch: int = 0


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
        hidden: bool [M, 1, Q, 1, block_size], keys that lie behind the query or before its window; beyond the first M
            items there are none. Where all queries of a tile are the same, [M, 1, 1, 1, block_size].
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
class Layout:
    """How attention is computed with one window.

    Attributes:
        groups: the query tiles.
        output_rows: int64 [P], where each row's query lies in the concatenated tiles of all groups.
    """

    groups: list[TileGroup]
    output_rows: Tensor


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Index tensors of one step.

    Attributes:
        row_count: rows that are tokens, R; what follows up to the padded number P is computed for nobody.
        token_ids: int64 [P].
        positions: int64 [P].
        blocks: int64 [R], block that takes the row's key and value.
        slots: int64 [R], place in that block.
        layouts: of attention, by window.
        drawn_rows: int64, rows whose logits are wanted, padded like P.
        drawn_count: how many of them there are.
    """

    row_count: int
    token_ids: Tensor
    positions: Tensor
    blocks: Tensor
    slots: Tensor
    layouts: dict[int | None, Layout]
    drawn_rows: Tensor
    drawn_count: int


class _Pages(NamedTuple):
    """Where keys lie: the block tables of all sequences, one behind the other, and where each begins; the position of
    each row; and the positions of a page."""

    tables: Integers
    table_offsets: Integers
    positions: Integers
    size: int

    def of_tiles(self, first_rows: Integers, last_rows: Integers, window: int | None) -> tuple[Integers, Integers]:
        """The last page of each tile and how many there are back to the first that a query sees."""
        last = self.positions[last_rows] // self.size
        if window is None:
            return last, last + 1
        return last, last + 1 - np.maximum(self.positions[first_rows] - window + 1, 0) // self.size


class _Tiles(NamedTuple):
    """Query tiles in the making: the sequence, the first row and the number of queries of each."""

    sequences: Integers
    first_rows: Integers
    sizes: Integers


def plan_step(batch: Batch, block_size: int, tiling: Tiling, windows: Sequence[int | None] = (None,)) -> StepPlan:
    """Lays out a batch.

    Args:
        batch: at least one chunk, each with at least one token and a table that covers all of its positions.
        block_size: positions per block.
        tiling: sizes to cut into.
        windows: of the model's layers, each once.
    """
    chunks = batch.chunks
    lengths = np.array([len(chunk.token_ids) for chunk in chunks])
    starts = np.array([chunk.start for chunk in chunks])
    tables = np.fromiter(chain.from_iterable(chunk.block_table for chunk in chunks), np.int64)
    table_offsets = _offsets(np.array([len(chunk.block_table) for chunk in chunks]))
    row_offsets, row_count = _offsets(lengths), int(lengths.sum())

    positions = np.arange(row_count) + np.repeat(starts - row_offsets, lengths)
    pages = _Pages(tables, table_offsets, positions, block_size)
    token_ids = np.fromiter(chain.from_iterable(chunk.token_ids for chunk in chunks), np.int64, row_count)
    tiles = list(_cut(lengths, row_offsets, tiling.queries))
    drawn_rows = (row_offsets + lengths - 1)[[chunk.draws for chunk in chunks]]
    return StepPlan(
        row_count=row_count,
        token_ids=pad_rows(token_ids, tiling),
        positions=pad_rows(positions, tiling),
        blocks=torch.from_numpy(tables[np.repeat(table_offsets, lengths) + positions // block_size]),
        slots=torch.from_numpy(positions % block_size),
        layouts={window: _lay_out(tiles, pages, window, tiling) for window in windows},
        drawn_rows=pad_rows(drawn_rows, tiling),
        drawn_count=len(drawn_rows),
    )


def _lay_out(tiles: list[tuple[int, _Tiles]], pages: _Pages, window: int | None, tiling: Tiling) -> Layout:
    output_rows = np.zeros(padded_count(len(pages.positions), tiling), np.int64)
    groups, first_slot = [], 0
    for queries, of_size in tiles:
        for part in _split(of_size, pages, window, tiling.items):
            rows = part.first_rows[:, None] + np.minimum(np.arange(queries), part.sizes[:, None] - 1)
            output_rows[rows] = first_slot + np.arange(rows.size).reshape(rows.shape)
            first_slot += rows.size
            groups.append(_group(rows, part.sequences, pages, window))
    return Layout(groups, torch.from_numpy(output_rows))


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


def _split(tiles: _Tiles, pages: _Pages, window: int | None, items: int) -> Iterator[_Tiles]:
    """Sorts tiles by their number of pages, most first, and splits them where enough items have come together."""
    _, counts = pages.of_tiles(tiles.first_rows, tiles.first_rows + tiles.sizes - 1, window)
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    (bounds,) = np.nonzero(np.diff(before // items, prepend=-1, append=-1))
    for first, last in pairwise(bounds.tolist()):
        part = order[first:last]
        yield _Tiles(*(column[part] for column in tiles))


def _group(rows: Integers, sequences: Integers, pages: _Pages, window: int | None) -> TileGroup:
    """Lays out the items of tiles that are sorted by their number of pages.

    Args:
        rows: [T, Q].
        sequences: [T], whose tile each is.
        pages: of all sequences.
        window: of the queries.
    """
    tiles, queries = rows.shape
    last_pages, counts = pages.of_tiles(rows[:, 0], rows[:, -1], window)
    ranks = np.arange(counts[0])
    rank_sizes = tiles - np.searchsorted(counts[::-1], ranks, side="right")
    rank_offsets = _offsets(rank_sizes)
    item_ranks = np.repeat(ranks, rank_sizes)
    item_tiles = np.arange(len(item_ranks)) - rank_offsets[item_ranks]
    item_pages = last_pages[item_tiles] - item_ranks
    last_ranks = np.minimum(ranks, counts[:, None] - 1)

    # The queries of a tile lie on so many pages at most; on every page before these all keys are seen. A window may
    # begin on any page.
    partial = rank_sizes[: 1 + -(-(queries - 1) // pages.size)].sum() if window is None else len(item_ranks)
    keys = item_pages[:partial, None, None] * pages.size + np.arange(pages.size)
    at = pages.positions[rows[item_tiles[:partial]]][:, :, None]
    hidden = keys > at if window is None else (keys > at) | (keys <= at - window)
    return TileGroup(
        tiles=tiles,
        queries=queries,
        rank_sizes=rank_sizes.tolist(),
        rows=torch.from_numpy(rows[item_tiles].reshape(-1)),
        blocks=torch.from_numpy(pages.tables[pages.table_offsets[sequences[item_tiles]] + item_pages]),
        item_tiles=torch.from_numpy(item_tiles),
        tile_items=torch.from_numpy((rank_offsets[last_ranks] + np.arange(tiles)[:, None]).reshape(-1)),
        hidden=torch.from_numpy(hidden[:, None, :, None, :]),
    )


def _offsets(sizes: Integers) -> Integers:
    """Where each of these begins when they lie one behind the other."""
    return np.cumsum(sizes) - sizes


def padded_count(count: int, tiling: Tiling) -> int:
    """Rows of whole row tiles that hold so many."""
    smallest = tiling.rows[-1]
    return -(-count // smallest) * smallest


def pad_rows(values: Integers, tiling: Tiling) -> Tensor:
    """Fills up with zeros to whole row tiles."""
    padded = np.zeros(padded_count(len(values), tiling), np.int64)
    padded[: len(values)] = values
    return torch.from_numpy(padded)
