"""Steps in buckets, and graphs of them: the bits of the same steps without, and what is refused.

"cpu:0" goes the way of another device, and a function that is called again stands for a graph.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator

import pytest
import torch

from services.shard.kernels import plain
from services.shard.kernels.buckets import MOST_ROWS, Bucket, bucket_of
from services.shard.kernels.graphs import Recorder, recorder
from services.shard.kernels.plain import PlainKernels
from services.shard.kernels.plan import Tiling
from services.shard.kernels.transfer import EventTimer
from services.shard.models.architecture import Architecture, LayerKind
from services.shard.scheduler import Batch, Chunk
from tests.random_model import SMALL, random_model
from tests.unit.shard.test_transfer import FakeEvent

PAGE, BLOCKS, VOCABULARY = 8, 160, SMALL.vocabulary_size
WINDOWS = dataclasses.replace(SMALL, layers=tuple(LayerKind(window=window) for window in (21, None, 1)))


class CountingRecorder:
    """Counts what is recorded and what is done again."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kernels(shape: Architecture = SMALL, record: Recorder | None = None, device: str = "cpu:0") -> PlainKernels:
    model = random_model(shape)
    model.embedding.data[13] = torch.nan
    return PlainKernels(model, "float32", block_count=BLOCKS, block_size=PAGE, device=device, record=record)


def decode(start: int, token: int, table: list[int], *, draws: bool = True) -> Chunk:
    return Chunk(start, [token], table, draws=draws)


def healthy(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(14, VOCABULARY) for _ in range(count)]


@pytest.mark.parametrize(
    ("starts", "bucket"),
    [
        ([0], (1, 1)),
        ([7], (1, 1)),
        ([8], (1, 2)),
        ([16, 0, 3], (4, 4)),
        ([31] * 5, (8, 4)),
        ([0] * 64, (64, 1)),
        ([0] * 65, None),
        ([8] * 33, (64, 2)),
        ([16] * 33, None),
    ],
)
def test_buckets(starts: list[int], bucket: tuple[int, int] | None) -> None:
    batch = Batch([decode(start, 1, list(range(9))) for start in starts], [])
    assert bucket_of(batch, 8, Tiling(items=128)) == bucket
    assert MOST_ROWS == 64


def test_a_batch_with_a_part_of_a_prompt_has_none() -> None:
    batch = Batch([decode(3, 1, [0]), Chunk(0, [1, 2], [1], draws=True)], [])
    assert bucket_of(batch, 8, Tiling()) is None


@pytest.mark.parametrize("shape", [SMALL, WINDOWS], ids=["small", "windows"])
def test_graphs_give_the_bits_of_steps_without(shape: Architecture) -> None:
    """Batches of one to seven that grow over pages, next to parts of prompts: logits, tokens, keys and values."""
    record = CountingRecorder()
    without, graphed, draw = kernels(shape, device="cpu"), kernels(shape, record), random.Random(1)
    blocks = draw.sample(range(BLOCKS), 7 * 20)
    tables = [blocks[20 * index : 20 * index + 20] for index in range(7)]
    lengths, decoded = [0] * 7, 0
    for step in range(60):
        chosen = draw.sample(range(7), draw.randint(1, 7))
        counts = [1 if step % 10 else draw.randint(1, 30) for _ in chosen]
        chunks = [
            Chunk(lengths[i], healthy(draw, n), tables[i], draws=draw.random() < 0.9)
            for i, n in zip(chosen, counts, strict=True)
        ]
        for i, n in zip(chosen, counts, strict=True):
            lengths[i] = lengths[i] + n if lengths[i] < 120 else 0
        decoded += all(n == 1 for n in counts)
        batch, wanted = Batch(chunks, []), [draw.random() < 0.5 for chunk in chunks if chunk.draws]
        expected, actual = without.forward(batch, wanted), graphed.forward(batch, wanted)
        assert actual.best == expected.best
        assert torch.equal(actual.values[wanted], expected.values[wanted])
    pools = zip([*without.cache.keys, *without.cache.values], [*graphed.cache.keys, *graphed.cache.values], strict=True)
    assert all(torch.equal(pool, other) for pool, other in pools)
    assert 4 < record.recorded < decoded / 2
    assert record.replayed == decoded > 50  # each graph's first step is done again to look at its bits


def test_a_row_that_is_filled_up_with_is_as_broken_as_the_one_it_repeats() -> None:
    """R22: three sequences, the last one no number, in a bucket of four."""
    graphed = kernels(record=CountingRecorder())
    chunks = [decode(0, 20, [1]), decode(0, 21, [2]), decode(0, 13, [3])]
    alone = [graphed.forward(Batch([chunk], []), [True]).values[0] for chunk in chunks]
    for _ in range(3):
        logits = graphed.forward(Batch(chunks, []), [True] * 3).values
        assert torch.equal(logits[:2], torch.stack(alone[:2]))
        assert not logits[2].isfinite().any()
    assert all(pool.isfinite().all() for pool in graphed.cache.values)
    told = graphed.forward(Batch(chunks, []), [False, True, False])
    assert told.best is not None and told.best[2] == -1
    assert told.best[:2] == [int(row.argmax()) for row in alone[:2]]
    (later,) = graphed.forward(Batch([decode(1, 20, [3])], []), [True]).values
    assert not later.isfinite().any(), "its own past is broken"
    fresh = graphed.forward(Batch([decode(0, 20, [3])], []), [True]).values[0]
    assert torch.equal(fresh, alone[0]), "the next owner of its block sees nothing of it"


def failing(work: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing")


def forgetful(work: Callable[[], None]) -> Callable[[], None]:
    return lambda: None


@pytest.mark.parametrize(("record", "why"), [(failing, "not permitted"), (forgetful, "other bits")])
def test_a_graph_that_is_not_the_step_is_refused(record: Recorder, why: str, caplog: pytest.LogCaptureFixture) -> None:
    without, graphed = kernels(), kernels(record=record)
    for start in range(3):
        batch = Batch([decode(start, 20 + start, [4]), decode(start, 30, [6])], [])
        expected = without.forward(batch, [True, True]).values
        assert torch.equal(graphed.forward(batch, [True, True]).values, expected)
    (message,) = [item.getMessage() for item in caplog.records]
    assert why in message and str(Bucket(2, 1)) in message


def test_the_cpu_records_nothing() -> None:
    assert recorder("cpu") is None


@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_tells_what_the_device_took_of_it(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [Batch([decode(start, 20, [1])], []) for start in range(3)]
    assert kernels().forward(batches[0], [True]).device_ns is None
    stream = [1.0]
    begin, end = FakeEvent(), FakeEvent()
    monkeypatch.setattr(plain, "timer_of", lambda device: EventTimer(begin, end, lambda: stream))
    timed = kernels(record=CountingRecorder() if graphs else None)
    compute = timed._model.forward

    def computed(*arguments: object) -> object:
        stream.append(stream[-1] + 0.5)
        return compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(timed._model, "forward", computed)
    taken = [timed.forward(batch, [True]).device_ns for batch in batches]
    assert taken == ([1_000_000, 500_000, 500_000] if graphs else [500_000] * 3)
