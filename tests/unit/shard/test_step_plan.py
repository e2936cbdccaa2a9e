"""The layout of a step, whatever the batch."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.shard.kernels.plan import StepPlan, TileGroup, Tiling, plan_step
from services.shard.scheduler import Batch, Chunk

BLOCK_SIZE = 8
TILINGS = [
    Tiling(rows=(32,), queries=(16,), items=1000),
    Tiling(rows=(32, 4), queries=(16, 1), items=5),
    Tiling(rows=(8,), queries=(4, 2), items=1),
]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    chunks: list[Chunk] = []
    for index in range(draw(st.integers(1, 6))):
        start, length = draw(st.integers(0, 60)), draw(st.sampled_from([1, 1, 1, 2, 3, 16, 17, 18, 33, 40]))
        blocks = -(-(start + length) // BLOCK_SIZE) + draw(st.integers(0, 2))
        table = [100 * index + block for block in range(blocks)]
        ids = [1000 * index + start + offset for offset in range(length)]
        chunks.append(Chunk(start, ids, table, draws=draw(st.booleans())))
    return Batch(chunks, [])


def pages_seen(group: TileGroup) -> dict[tuple[int, int], list[tuple[int, list[bool]]]]:
    """For each query (row, tile * queries + place): blocks in the order of their addition, with the hidden keys."""
    rows = group.rows.numpy().reshape(-1, group.queries)
    seen: dict[tuple[int, int], list[tuple[int, list[bool]]]] = {}
    for item, (block, tile) in enumerate(zip(group.blocks.tolist(), group.item_tiles.tolist(), strict=True)):
        for place, row in enumerate(rows[item]):
            keys = group.hidden[item, 0, place, 0].tolist() if item < len(group.hidden) else [False] * BLOCK_SIZE
            seen.setdefault((int(row), tile * group.queries + place), []).append((block, keys))
    return seen


def expected_pages(chunk: Chunk, position: int, window: int | None) -> list[tuple[int, list[bool]]]:
    """From the query's own page back to the first of its window, all keys of the window up to the query's."""
    first = 0 if window is None else max(0, position - window + 1)
    return [
        (
            chunk.block_table[page],
            [not first <= page * BLOCK_SIZE + slot <= position for slot in range(BLOCK_SIZE)],
        )
        for page in range(position // BLOCK_SIZE, first // BLOCK_SIZE - 1, -1)
    ]


def positions_of(batch: Batch) -> list[tuple[Chunk, int]]:
    """Chunk and position of each row."""
    return [(chunk, chunk.start + offset) for chunk in batch.chunks for offset in range(len(chunk.token_ids))]


def check_groups(batch: Batch, plan: StepPlan, window: int | None) -> None:
    places: dict[int, int] = {}
    first, layout = 0, plan.layouts[window]
    for group in layout.groups:
        for (row, place), pages in pages_seen(group).items():
            chunk, position = positions_of(batch)[row]
            # Pages behind the query or before its window, which others of the tile see, are hidden: they add zeros.
            own = [page for page in pages if not all(page[1])]
            assert own == expected_pages(chunk, position, window)
            others = sum((group.queries - 2) // BLOCK_SIZE + 1 for _ in range(1 if window is None else 2))
            assert len(pages) - len(own) <= others
            places[first + place] = row
        first += group.tiles * group.queries
    assert [places[place] for place in layout.output_rows[: plan.row_count].tolist()] == list(range(plan.row_count))
    assert layout.output_rows.max() < first


@pytest.mark.parametrize("tiling", TILINGS)
@settings(deadline=None, max_examples=50)
@given(batch=batches())
def test_every_query_meets_its_own_keys_and_no_others(tiling: Tiling, batch: Batch) -> None:
    windows = [None, 1, 8, 13]
    plan = plan_step(batch, BLOCK_SIZE, tiling, windows)
    assert list(plan.layouts) == windows
    for window in windows:
        check_groups(batch, plan, window)


@pytest.mark.parametrize("tiling", TILINGS)
@settings(deadline=None, max_examples=50)
@given(batch=batches())
def test_items_are_laid_out_by_rank(tiling: Tiling, batch: Batch) -> None:
    layouts = plan_step(batch, BLOCK_SIZE, tiling, [None, 13]).layouts.values()
    for group in chain.from_iterable(layout.groups for layout in layouts):
        expected = [tile for count in group.rank_sizes for tile in range(count)]
        assert group.item_tiles.tolist() == expected
        assert group.rank_sizes == sorted(group.rank_sizes, reverse=True)
        assert group.rank_sizes[0] == group.tiles
        by_tile = group.tile_items.numpy().reshape(group.tiles, -1)
        for tile, items in enumerate(by_tile):
            assert set(items) == set(np.flatnonzero(np.array(expected) == tile))
        assert len(expected) - expected.count(group.tiles - 1) < tiling.items  # the last tile may exceed the limit


@pytest.mark.parametrize("tiling", TILINGS)
@settings(deadline=None, max_examples=50)
@given(batch=batches())
def test_rows_are_the_tokens_of_the_chunks(tiling: Tiling, batch: Batch) -> None:
    plan = plan_step(batch, BLOCK_SIZE, tiling)
    rows = positions_of(batch)
    count = plan.row_count
    assert count == len(rows)
    assert plan.token_ids[:count].tolist() == [token for chunk in batch.chunks for token in chunk.token_ids]
    assert plan.positions[:count].tolist() == [position for _, position in rows]
    assert plan.blocks.tolist() == [chunk.block_table[position // BLOCK_SIZE] for chunk, position in rows]
    assert plan.slots.tolist() == [position % BLOCK_SIZE for _, position in rows]
    ends = np.cumsum([len(chunk.token_ids) for chunk in batch.chunks])
    drawn = [end - 1 for end, chunk in zip(ends, batch.chunks, strict=True) if chunk.draws]
    assert plan.drawn_rows[: plan.drawn_count].tolist() == drawn
    for padded, needed in (
        (plan.token_ids, count),
        (plan.layouts[None].output_rows, count),
        (plan.drawn_rows, len(drawn)),
    ):
        assert len(padded) % tiling.rows[-1] == 0
        assert 0 <= len(padded) - needed < tiling.rows[-1]
