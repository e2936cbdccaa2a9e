"""Where the rows of a step lie, for the native kernels: index arrays from a batch.

Knows block tables and counts; nothing of models.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from services.shard.scheduler import Batch

Indices = NDArray[np.int32]


class Rows(NamedTuple):
    """Arrays of int32, as `StepLayout` names them."""

    token_ids: Indices
    positions: Indices
    row_blocks: Indices
    tables: Indices
    tile_first_row: Indices
    tile_row_count: Indices
    tile_table: Indices
    drawn_rows: Indices


def lay_out(batch: Batch, block_size: int, tile_tokens: int) -> Rows:
    """Lays out a batch.

    Args:
        batch: at least one chunk, each with at least one token and a table that covers all of its positions.
        block_size: positions per block.
        tile_tokens: most tokens of a query tile; no result depends on it.
    """
    chunks = batch.chunks
    lengths = np.array([len(chunk.token_ids) for chunk in chunks])
    starts = np.array([chunk.start for chunk in chunks])
    tables = np.fromiter(chain.from_iterable(chunk.block_table for chunk in chunks), np.int32)
    table_offsets = _offsets(np.array([len(chunk.block_table) for chunk in chunks]))
    row_offsets, row_count = _offsets(lengths), int(lengths.sum())
    positions = np.arange(row_count) + np.repeat(starts - row_offsets, lengths)

    counts = -(-lengths // tile_tokens)
    sequences = np.repeat(np.arange(len(chunks)), counts)
    done = (np.arange(len(sequences)) - np.repeat(_offsets(counts), counts)) * tile_tokens
    return Rows(
        token_ids=np.fromiter(chain.from_iterable(chunk.token_ids for chunk in chunks), np.int32, row_count),
        positions=positions.astype(np.int32),
        row_blocks=tables[np.repeat(table_offsets, lengths) + positions // block_size],
        tables=tables,
        tile_first_row=(row_offsets[sequences] + done).astype(np.int32),
        tile_row_count=np.minimum(lengths[sequences] - done, tile_tokens).astype(np.int32),
        tile_table=table_offsets[sequences].astype(np.int32),
        drawn_rows=(row_offsets + lengths - 1)[[chunk.draws for chunk in chunks]].astype(np.int32),
    )


def _offsets(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of these begins when they lie one behind the other."""
    return np.cumsum(sizes) - sizes
