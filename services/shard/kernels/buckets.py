"""Buckets: the layout of a step that only decodes, in shapes that few numbers decide.

In such a step two numbers decide all shapes: its sequences, and the most pages that one of them has. A bucket is both,
filled up to powers of two:

- rows by repeating the last one, which stores the same key and value at the same place once more;
- pages by repeating a sequence's first one with all of its keys hidden, which adds exact zeros, as in `plan.py`.

So what is filled up changes no bit of any row (R23) and needs no block that nobody owns.
Knows block tables and counts; nothing of models or kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from services.shard.kernels.plan import Integers, Layout, StepPlan, TileGroup, Tiling, pad_rows, padded_count

if TYPE_CHECKING:
    from services.shard.scheduler import Batch

MOST_ROWS = 64
"""Of a bucket. Steps with more have enough work in each launch."""


class Bucket(NamedTuple):
    """How many sequences there is room for, and how many pages of each."""

    rows: int
    pages: int


def bucket_of(batch: Batch, block_size: int, tiling: Tiling) -> Bucket | None:
    """The smallest bucket that holds a batch; None if it does not only decode, or is too large.

    Too large is what takes more than one round of attention: what a short sequence would compute for nothing beside a
    long one costs more then than launches do.
    """
    if any(len(chunk.token_ids) != 1 for chunk in batch.chunks):
        return None
    pages = 1 + max(chunk.start for chunk in batch.chunks) // block_size
    bucket = Bucket(_power_of_two(len(batch.chunks)), _power_of_two(pages))
    return bucket if bucket.rows <= MOST_ROWS and bucket.rows * bucket.pages <= tiling.items else None


def plan_bucket(
    batch: Batch, bucket: Bucket, block_size: int, tiling: Tiling, windows: Sequence[int | None] = (None,)
) -> StepPlan:
    """Lays out a batch that only decodes; shapes, sizes and counts follow from the bucket, `drawn_count` apart.

    Args:
        batch: as for `plan_step`.
        bucket: from `bucket_of`.
        block_size: positions per block.
        tiling: sizes to cut into.
        windows: of the model's layers, each once.
    """
    chunks = [*batch.chunks, *[batch.chunks[-1]] * (bucket.rows - len(batch.chunks))]
    positions = np.array([chunk.start for chunk in chunks])
    tables = np.zeros(bucket, np.int64)
    for row, chunk in enumerate(chunks):
        table = chunk.block_table[: chunk.start // block_size + 1]
        tables[row, : len(table)] = table
    drawn = np.flatnonzero([chunk.draws for chunk in batch.chunks])
    drawn_rows = np.zeros(padded_count(bucket.rows, tiling), np.int64)
    drawn_rows[: len(drawn)] = drawn
    return StepPlan(
        row_count=bucket.rows,
        token_ids=pad_rows(np.array([chunk.token_ids[0] for chunk in chunks]), tiling),
        positions=pad_rows(positions, tiling),
        blocks=torch.from_numpy(tables[np.arange(bucket.rows), positions // block_size]),
        slots=torch.from_numpy(positions % block_size),
        layouts={window: _lay_out(positions, tables, block_size, window, tiling) for window in windows},
        drawn_rows=torch.from_numpy(drawn_rows),
        drawn_count=len(drawn),
    )


def _lay_out(positions: Integers, tables: Integers, size: int, window: int | None, tiling: Tiling) -> Layout:
    """One group of tiles, each with one query and as many pages as the bucket has, or as a window can touch.

    Args:
        positions: [rows].
        tables: [rows, pages].
        size: positions per page.
        window: of the queries.
        tiling: sizes to cut into.
    """
    rows, pages = tables.shape
    if window is not None:
        pages = min(pages, 1 + -(-(window - 1) // size))
    queries, tiles, ranks = tiling.queries[-1], np.arange(rows), np.arange(pages)
    wanted = (positions // size)[:, None] - ranks  # negative where a sequence has no such page
    keys = wanted.T[:, :, None] * size + np.arange(size)
    first = 0 if window is None else np.maximum(positions - window + 1, 0)[:, None]
    hidden = (keys > positions[:, None]) | (keys < first)
    group = TileGroup(
        tiles=rows,
        queries=queries,
        rank_sizes=[rows] * pages,
        rows=torch.from_numpy(np.tile(np.repeat(tiles, queries), pages)),
        blocks=torch.from_numpy(np.take_along_axis(tables, np.maximum(wanted, 0), 1).T.reshape(-1)),
        item_tiles=torch.from_numpy(np.tile(tiles, pages)),
        tile_items=torch.from_numpy((ranks * rows + tiles[:, None]).reshape(-1)),
        hidden=torch.from_numpy(hidden.reshape(rows * pages, 1, 1, 1, size)),
    )
    return Layout([group], pad_rows(tiles * queries, tiling))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
