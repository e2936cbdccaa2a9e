"""A step's logits against the reference, and R23: equal bits whatever else happens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.shard.runner import Runner
from services.shard.scheduler import Batch, Chunk
from tests.random_model import SMALL, random_model, small, write_model
from tests.reference import Reference

BLOCK_SIZE = 64
KV_MEMORY = 24 << 20

WIDE = small(hidden_size=256, intermediate_size=1500, head_count=8, head_size=32, vocabulary_size=1000)
"""Wide enough for threads to share the work, with a product longer than a slice and a width that no vector divides."""

MULTI_HEAD = small(kv_head_count=4, tied_embeddings=True)
"""One query head per kv head, hence a product with a single row if a query tile had one query."""


def open_runner(
    folder: Path, *, threads: int = 1, block_size: int = BLOCK_SIZE, kernels: str = "plain", dtype: str = "auto"
) -> Runner:
    return Runner(folder, block_size=block_size, kv_memory=KV_MEMORY, threads=threads, kernels=kernels, dtype=dtype)


@pytest.fixture(scope="module", params=[SMALL, WIDE, MULTI_HEAD], ids=["small", "wide", "multi-head"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "random", random_model(request.param))


@pytest.fixture(scope="module", params=["native", "plain"])
def runner(request: pytest.FixtureRequest, folder: Path) -> Runner:
    return open_runner(folder, kernels=request.param)


class Sequence:
    """Ids, blocks, and how many of the ids are computed."""

    def __init__(self, token_ids: list[int], blocks: list[int]) -> None:
        self.token_ids, self.blocks, self.computed = token_ids, blocks, 0

    def chunk(self, size: int, *, padding: int = 0) -> Chunk:
        """The next `size` tokens; `padding` blocks more than needed stand in the table."""
        start, end = self.computed, min(self.computed + size, len(self.token_ids))
        self.computed = end
        return Chunk(start, self.token_ids[start:end], self.blocks[: -(-end // BLOCK_SIZE) + padding], draws=True)


def random_ids(runner: Runner, count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(runner.vocabulary_size), k=count)


def compute(runner: Runner, sequence: Sequence, sizes: list[int]) -> dict[int, Tensor]:
    """Computes a sequence alone in chunks of these sizes: logits by the position behind which they stand."""
    logits = {}
    for size in sizes:
        (row,) = runner.forward(Batch([sequence.chunk(size)], [])).values
        logits[sequence.computed - 1] = row
    return logits


def random_sizes(draw: random.Random, total: int) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(min(draw.choice([1, 2, 3, 15, 16, 33, 50]), total - sum(sizes)))
    return sizes


def assert_equal_bits(actual: dict[int, Tensor], expected: Tensor) -> None:
    for position, row in actual.items():
        assert torch.equal(row, expected[position]), f"position {position} differs"


def token_by_token(runner: Runner, token_ids: list[int]) -> Tensor:
    """Logits [tokens, V], decoded one token at a time in a batch of one."""
    sequence = Sequence(token_ids, list(range(-(-len(token_ids) // BLOCK_SIZE))))
    return torch.stack(list(compute(runner, sequence, [1] * len(token_ids)).values()))


def test_logits_are_those_of_the_reference(folder: Path, runner: Runner) -> None:
    reference = Reference(folder)
    token_ids = random_ids(runner, 150, seed=1)
    expected = reference.logits(token_ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(token_by_token(runner, token_ids), expected, atol=1e-4, rtol=1e-4)


def test_greedy_tokens_are_those_of_the_reference(folder: Path, runner: Runner) -> None:
    reference = Reference(folder)
    prompt = random_ids(runner, 60, seed=2)
    sequence = Sequence(list(prompt), [3, 1])
    (logits,) = runner.forward(Batch([sequence.chunk(len(prompt))], [])).values
    for _ in range(20):
        sequence.token_ids.append(int(logits.argmax()))
        (logits,) = runner.forward(Batch([sequence.chunk(1)], [])).values
    assert sequence.token_ids[60:] == reference.greedy(prompt, 20)


def test_chunks_do_not_change_bits(runner: Runner) -> None:
    """R23: prefill in any pieces and decode are the same numbers."""
    token_ids = random_ids(runner, 200, seed=3)
    expected, draw = token_by_token(runner, token_ids), random.Random(4)
    fixed = [[200], [199, 1], [100, 100], [64, 64, 64, 8], [63, 65, 72], [17] * 11 + [13]]
    for sizes in fixed + [random_sizes(draw, 200) for _ in range(3)]:
        sequence = Sequence(token_ids, draw.sample(range(runner.block_count), 4))
        assert_equal_bits(compute(runner, sequence, sizes), expected)


def test_neighbours_do_not_change_bits(runner: Runner) -> None:
    """R23: neither their number, their content, their chunks, the place in the batch, nor the blocks that one has."""
    lengths = [1, 5, 64, 65, 130, 31, 17]
    token_ids = [random_ids(runner, length, seed) for seed, length in enumerate(lengths)]
    expected = [token_by_token(runner, ids) for ids in token_ids]
    draw = random.Random(5)
    for _ in range(2):
        blocks = draw.sample(range(runner.block_count), 5 * len(token_ids))
        sequences = [Sequence(ids, blocks[5 * i : 5 * i + 5]) for i, ids in enumerate(token_ids)]
        while waiting := [i for i, sequence in enumerate(sequences) if sequence.computed < len(sequence.token_ids)]:
            chosen = draw.sample(waiting, draw.randint(1, len(waiting)))
            sizes = draw.choice([[1], [1, 2, 40], [16, 64], [200]])
            chunks = [sequences[i].chunk(draw.choice(sizes), padding=draw.randint(0, 1)) for i in chosen]
            logits = runner.forward(Batch(chunks, [])).values
            for i, row in zip(chosen, logits, strict=True):
                assert torch.equal(row, expected[i][sequences[i].computed - 1])


def test_threads_do_not_change_bits(runner: Runner) -> None:
    """R23: a prompt, a rest of a prompt and several decoding sequences, by one thread and by more."""
    lengths = [200, 150, 64, 65, 90, 33]
    token_ids = [random_ids(runner, length, seed) for seed, length in enumerate(lengths)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        sequences = [Sequence(ids, list(range(4 * i, 4 * i + 4))) for i, ids in enumerate(token_ids)]
        runner.forward(Batch([sequence.chunk(len(sequence.token_ids) - 1) for sequence in sequences[1:]], []))
        results.append(runner.forward(Batch([sequence.chunk(200) for sequence in sequences], [])).values)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_pages_of_other_sizes_agree_with_the_reference(folder: Path) -> None:
    runner, reference = open_runner(folder, block_size=8), Reference(folder)
    token_ids = random_ids(runner, 50, seed=6)
    (logits,) = runner.forward(Batch([Chunk(0, token_ids, list(range(10, 17)), draws=True)], [])).values
    torch.testing.assert_close(logits, reference.logits(token_ids)[-1], atol=1e-4, rtol=1e-4)


def test_later_tokens_change_nothing_before_them(runner: Runner) -> None:
    """Causality bit for bit: computed in one chunk, with another end, every earlier token's key and value are equal."""
    token_ids = random_ids(runner, 100, seed=7)
    for place in (99, 80, 64, 63, 17):
        changed = [*token_ids[:place], *random_ids(runner, 100 - place, seed=8)]
        rows = []
        for ids in (token_ids, changed):
            sequence = Sequence(ids, [7, 9])
            runner.forward(Batch([sequence.chunk(100)], []))
            # Whoever decodes again behind the common part reads the keys and values that the chunk has left.
            rows.append(
                runner.forward(Batch([Chunk(place - 1, [token_ids[place - 1]], [7, 9], draws=True)], [])).values[0]
            )
        assert torch.equal(rows[0], rows[1])


def test_only_chunks_that_draw_have_logits_in_their_order(runner: Runner) -> None:
    token_ids = [random_ids(runner, 9, seed) for seed in range(3)]
    expected = [token_by_token(runner, ids)[-1] for ids in token_ids]
    chunks = [Chunk(0, ids, [4 + i], draws=i != 1) for i, ids in enumerate(token_ids)]
    logits = runner.forward(Batch(chunks, [])).values
    assert logits.dtype == torch.float32
    assert logits.shape == (2, runner.vocabulary_size)
    assert torch.equal(logits, torch.stack([expected[0], expected[2]]))
    assert runner.forward(Batch([chunks[1]], [])).values.shape == (0, runner.vocabulary_size)
    assert runner.forward(Batch([], [])).values.shape == (0, runner.vocabulary_size)


def test_copied_blocks_diverge(runner: Runner) -> None:
    """Copy-on-write: both owners of a block go on from the same past, and neither sees the other's tokens."""
    prompt = random_ids(runner, 70, seed=9)
    ends = [random_ids(runner, 5, seed) for seed in (10, 11)]
    expected = [token_by_token(runner, prompt + end) for end in ends]
    first = Sequence(prompt + ends[0], [20, 21])
    runner.forward(Batch([first.chunk(70)], []))
    second = Sequence(prompt + ends[1], [20, 22])
    second.computed = 70
    for step, copies in enumerate([[(21, 22)], [], [], [], []]):
        logits = runner.forward(Batch([first.chunk(1), second.chunk(1)], copies)).values
        assert torch.equal(logits[0], expected[0][70 + step])
        assert torch.equal(logits[1], expected[1][70 + step])


def test_a_sequence_that_is_not_finite_fails_alone(tmp_path: Path) -> None:
    """R22: neither its neighbours nor the next owner of its blocks see it, but it stays broken itself."""
    model = random_model()
    views = model.checkpoint_views()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        views[f"model.layers.0.{name}.weight"][5] = 0.0
    model.embedding.data[:, 5] = 0.0
    model.embedding.data[13, 5] = 100.0
    # Token 13 alone overflows, and only in a value of the last layer: no key gives it away to the tokens behind it.
    views["model.layers.1.self_attn.v_proj.weight"][0, 5] = 3e38
    runner = open_runner(write_model(tmp_path / "broken", model))
    healthy = [index % 10 for index in range(40)]
    expected = token_by_token(runner, healthy)
    assert expected.isfinite().all()
    broken = Chunk(0, [13] * 40, [5], draws=True)
    logits = runner.forward(Batch([broken, Chunk(0, healthy, [6], draws=True)], [])).values
    assert not logits[0].isfinite().all()
    assert torch.equal(logits[1], expected[-1])
    (later,) = runner.forward(Batch([Chunk(40, [1], [5], draws=True)], [])).values
    assert not later.isfinite().all()
    runner.forward(Batch([broken], []))
    assert_equal_bits(compute(runner, Sequence(healthy, [5]), [7, 1, 32]), expected)


def test_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    """R20: equal for equal files, another one for other weights."""
    folders = [write_model(tmp_path / name, random_model(seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    prints = [open_runner(folder).fingerprint for folder in folders]
    assert [item.model for item in prints] == ["a", "b", "c"]
    assert prints[0].weights == prints[1].weights != prints[2].weights
    assert prints[0].kernels == prints[1].kernels == open_runner(folders[0], threads=2).fingerprint.kernels


def test_a_pool_without_a_block_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", random_model())
    with pytest.raises(ValueError, match="kv_memory"):
        Runner(folder, block_size=BLOCK_SIZE, kv_memory=1000, threads=1, kernels="plain")
    runner = Runner(folder, block_size=BLOCK_SIZE, kv_memory=1 << 20, threads=1, kernels="plain")
    assert runner.block_count == (1 << 20) // (2 * 2 * 64 * 2 * 16 * 4)
    assert Runner(folder, block_size=BLOCK_SIZE, kv_memory=1 << 30, threads=1).block_count == 64 * 512 // BLOCK_SIZE


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = write_model(tmp_path / "model", random_model())
    with pytest.raises(ValueError, match=r"^device: "):
        Runner(folder, block_size=BLOCK_SIZE, kv_memory=KV_MEMORY, threads=1, device="cuda")
