"""What goes to a device and comes from it; "cpu:0" goes the way of another device."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.shard.kernels.plan import Tiling, plan_step
from services.shard.kernels.transfer import EventTimer, copy_rows, fetch, largest, move, pack, timer_of, unpack
from services.shard.scheduler import Batch, Chunk
from tests.unit.shard.test_step_plan import BLOCK_SIZE, batches

TILING = Tiling(rows=(32, 4), queries=(16, 1), items=5)


@settings(deadline=None, max_examples=20)
@given(batch=batches())
def test_a_moved_plan_is_the_plan(batch: Batch) -> None:
    plan = plan_step(batch, BLOCK_SIZE, TILING, [None, 13])
    assert move(plan, "cpu") is plan
    moved = move(plan, "cpu:0")
    assert moved.token_ids.data_ptr() != plan.token_ids.data_ptr()
    assert (moved.row_count, moved.drawn_count) == (plan.row_count, plan.drawn_count)
    for name in ("token_ids", "positions", "blocks", "slots", "drawn_rows"):
        assert torch.equal(getattr(moved, name), getattr(plan, name))
    for window, layout in plan.layouts.items():
        assert torch.equal(moved.layouts[window].output_rows, layout.output_rows)
        for group, copy in zip(layout.groups, moved.layouts[window].groups, strict=True):
            assert (copy.tiles, copy.queries, copy.rank_sizes) == (group.tiles, group.queries, group.rank_sizes)
            for name in ("rows", "blocks", "item_tiles", "tile_items", "hidden"):
                assert torch.equal(getattr(copy, name), getattr(group, name))


def test_a_plan_of_the_same_shapes_can_take_the_place_of_another() -> None:
    plans = [plan_step(Batch([Chunk(0, [token], [token], draws=True)], []), 8, TILING) for token in (3, 5)]
    place = pack(plans[0], "cpu")
    views = unpack(plans[0], place)
    assert int(views.token_ids[0]) == int(views.blocks[0]) == 3
    place.copy_(pack(plans[1], "cpu"))
    assert int(views.token_ids[0]) == int(views.blocks[0]) == 5


@pytest.mark.parametrize(
    ("row", "best"),
    [
        ([0.0, 2.0, 1.0], 1),
        ([2.0, 0.0, 2.0], 0),
        ([-3.0, -1.0, -1.0], 1),
        ([0.0, torch.nan, 1.0], -1),
        ([0.0, torch.inf, 1.0], -1),
        ([0.0, 1.0, -torch.inf], -1),
    ],
)
def test_the_largest_is_the_lowest_such_and_none_where_one_is_no_number(row: list[float], best: int) -> None:
    logits = torch.tensor([[0.0, 0.0, 1.0], row, [1.0, 0.0, 0.0]])
    assert largest(logits).tolist() == [2, best, 0]


@given(wanted=st.lists(st.booleans(), max_size=8))
def test_only_wanted_rows_are_copied(wanted: Sequence[bool]) -> None:
    source, target = torch.arange(3.0 * len(wanted)).view(-1, 3), torch.full((len(wanted), 3), -1.0)
    copy_rows(source, target, wanted)
    for row, copied, wants in zip(source, target, wanted, strict=True):
        assert torch.equal(copied, row if wants else torch.full((3,), -1.0))


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
@pytest.mark.parametrize("finite", [True, False])
def test_results(device: str, finite: bool) -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    everything = fetch(torch.tensor(finite), logits, [True] * 4, device)
    assert torch.equal(everything.values, logits)
    assert everything.numbers.tolist() == [finite]
    some = fetch(torch.tensor(finite), logits, [True, False, True, False], device)
    assert torch.equal(some.values[::2], logits[::2])
    assert some.numbers.tolist() == [finite, *logits.argmax(-1).tolist()]
    nothing = fetch(torch.tensor(finite), logits[:0], [], device)
    assert (nothing.values.shape, nothing.numbers.tolist()) == ((0, 9), [finite])


class FakeEvent:
    """An event of a device whose clock is in its stream: a list with milliseconds, then marks."""

    def __init__(self) -> None:
        self.at, self.waited = 0.0, False

    def record(self, stream: list[float]) -> None:
        self.at, self.waited = stream[-1], False

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end_event: FakeEvent) -> float:
        assert end_event.waited, "asked before the device was done"
        return end_event.at - self.at


def test_time_is_that_between_two_events_on_the_stream_of_the_moment() -> None:
    streams = [[10.0], [500.0]]
    timer = EventTimer(FakeEvent(), FakeEvent(), lambda: streams[-1])
    timer.start()
    streams[-1].append(500.25)
    assert timer.stop() == 250_000
    streams.pop()
    timer.start()
    streams[-1].append(12.0)
    assert timer.stop() == 2_000_000


def test_the_cpu_has_no_time_of_its_own() -> None:
    timer = timer_of("cpu")
    timer.start()
    assert timer.stop() is None
