"""Each operation of serving: right numbers, and bits that depend on the row alone (R23)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from services.shard.kernels import probe, tiled
from services.shard.kernels.dense import DenseOperations
from services.shard.kernels.plan import Tiling, plan_step
from services.shard.kv_cache import KeyValueCache
from services.shard.models.architecture import Activation
from services.shard.scheduler import Batch, Chunk

COUNTS = [4, 8, 12, 32, 36, 128, 200]


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operations_of(tiling: Tiling) -> tiled.TiledOperations:
    """For the operations that look at no plan."""
    cache = KeyValueCache(layers=1, block_count=1, block_size=8, kv_heads=1, head_size=8)
    return tiled.TiledOperations(plan_step(Batch([Chunk(0, [0], [0], draws=True)], []), 8, tiling), cache, tiling)


def assert_rows_stand_alone(compute: Callable[[Tensor], Tensor], rows: Tensor) -> None:
    """Every row gives the same bits in every number of rows and at every place, by one thread and by three."""
    expected = torch.cat([compute(rows[first : first + 4]) for first in range(0, len(rows), 4)])
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for count in COUNTS:
            first = 4 * (count % 7)
            actual = compute(rows[first : first + count].clone())
            assert torch.equal(actual, expected[first : first + count]), f"{count} rows, {threads} threads"


@pytest.mark.parametrize("shape", [(96, 64), (100, 33), (1408, 256), (192, 1500), (64, 512)])
def test_linear(shape: tuple[int, int]) -> None:
    weight = tiled.pack(random_rows(*shape, seed=1))
    tiling = probe.find_tiling([weight], kv_heads=1, group=2, head_size=16, block_size=64)
    operations, rows = operations_of(tiling), random_rows(256, shape[1])
    if tiling.rows[-1] == 4:
        assert_rows_stand_alone(lambda part: operations.linear(part, weight), rows)
    standard = operations_of(Tiling())
    assert torch.equal(operations.linear(rows, weight), standard.linear(rows, weight))
    exact = (rows.double() @ weight.double().t()).float()
    torch.testing.assert_close(standard.linear(rows, weight), exact, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("width", [64, 100, 257, 1500])
def test_operations_within_a_row(width: int) -> None:
    operations, norm = operations_of(Tiling()), random_rows(width, seed=2)
    rows = 4 * random_rows(256, width)
    dense = DenseOperations()
    assert_rows_stand_alone(lambda part: operations.rms_norm(part, norm, 1e-6), rows)
    torch.testing.assert_close(operations.rms_norm(rows, norm, 1e-6), dense.rms_norm(rows, norm, 1e-6))
    gates = torch.cat([rows, random_rows(256, width, seed=3)], -1)
    for activation in Activation:
        assert_rows_stand_alone(functools.partial(operations.gate, activation=activation), gates)
        expected = dense.gate(gates.double(), activation).float()
        torch.testing.assert_close(operations.gate(gates, activation), expected, atol=1e-5, rtol=2e-6)
    assert_rows_stand_alone(lambda part: operations.softcap(part.clone(), 5.0), rows)
    expected = dense.softcap(rows.double(), 5.0).float()
    torch.testing.assert_close(operations.softcap(rows.clone(), 5.0), expected, atol=2e-6, rtol=2e-6)


def test_gates_at_the_ends_of_float32() -> None:
    ends = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 1e30] + [1.0] * 6])
    operations = operations_of(Tiling())
    torch.testing.assert_close(operations.gate(ends, Activation.SILU), functional.silu(ends[:, :6]))
    expected = functional.gelu(ends[:, :6], approximate="tanh")
    torch.testing.assert_close(operations.gate(ends, Activation.GELU_TANH), expected)


@pytest.mark.parametrize("size", [16, 24, 64])
def test_norms_of_heads(size: int) -> None:
    """Of a part of each row's heads, as queries and keys are parts of one product."""
    operations, norm, rows = operations_of(Tiling()), random_rows(size, seed=2), random_rows(256, 5 * size)

    def compute(part: Tensor) -> Tensor:
        return operations.rms_norm(part.view(-1, 5, size)[:, 1:4], norm, 1e-6)

    assert_rows_stand_alone(compute, rows)
    heads = rows.view(-1, 5, size)[:, 1:4].double()
    expected = heads * (heads.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm
    torch.testing.assert_close(compute(rows), expected.float())


@pytest.mark.parametrize("size", [6, 32])
def test_rotary(size: int) -> None:
    operations, dense = operations_of(Tiling()), DenseOperations()
    heads, cosine, sine = random_rows(256, 5, size), random_rows(256, size, seed=1), random_rows(256, size, seed=2)
    expected = dense.rotary(heads, cosine, sine)
    assert torch.equal(operations.rotary(heads, cosine, sine), expected)
    tables = torch.cat([cosine, sine, heads.flatten(1)], 1)

    def turn(part: Tensor) -> Tensor:
        return operations.rotary(part[:, 2 * size :].view(-1, 5, size), part[:, :size], part[:, size : 2 * size])

    assert_rows_stand_alone(turn, tables)


@pytest.mark.parametrize(
    "tiling",
    [Tiling(queries=(16, 1)), Tiling(queries=(16, 2), items=3), Tiling(queries=(4,)), Tiling(launch=5)],
)
@pytest.mark.parametrize(
    ("kv_heads", "window", "softcap"), [(1, None, None), (2, None, 2.0), (4, 8, None), (2, 1, None), (2, 21, 3.0)]
)
def test_attention_is_that_of_whole_sequences(
    tiling: Tiling, kv_heads: int, window: int | None, softcap: float | None
) -> None:
    """Three sequences at once, in several steps, over a pool that is full of what others have left."""
    lengths, page, size = [70, 9, 33], 8, 16
    generator = torch.Generator().manual_seed(0)
    cache = KeyValueCache(layers=2, block_count=40, block_size=page, kv_heads=kv_heads, head_size=size)
    for pool in (*cache.keys, *cache.values):
        pool.uniform_(-100, 100, generator=generator)
    cache.keys[1].fill_(torch.nan)  # what a broken sequence leaves; values are always finite
    blocks = torch.randperm(40, generator=generator).tolist()
    tables = [blocks[:9], blocks[9:11], blocks[11:16]]
    inputs = [[random_rows(n, heads, size, seed=n + heads) for heads in (4, kv_heads, kv_heads)] for n in lengths]
    attend: dict[str, Any] = {"scale": 0.3, "window": window, "softcap": softcap}
    expected = [DenseOperations().attention(1, *sequence, **attend) for sequence in inputs]
    outputs: list[list[Tensor]] = [[], [], []]
    computed = [0, 0, 0]
    for sizes in ([40, 1, 16], [1, 1, 1], [20, 2, 16], [9, 5, 0]):
        chosen = [index for index, count in enumerate(sizes) if count]
        ends = [computed[index] + sizes[index] for index in chosen]
        chunks = [Chunk(computed[i], [0] * sizes[i], tables[i], draws=True) for i in chosen]
        operations = tiled.TiledOperations(plan_step(Batch(chunks, []), page, tiling, [window]), cache, tiling)
        spans = [slice(computed[index], end) for index, end in zip(chosen, ends, strict=True)]
        rows = [torch.cat([inputs[i][j][span] for i, span in zip(chosen, spans, strict=True)]) for j in range(3)]
        padding = -len(rows[0]) % tiling.rows[-1]
        padded = (torch.cat([part, part[:1].expand(padding, -1, -1)]) for part in rows)
        mixed = operations.attention(1, *padded, **attend)
        for index, part in zip(chosen, mixed[: sum(sizes)].split_with_sizes([sizes[i] for i in chosen]), strict=True):
            outputs[index].append(part)
        for index, end in zip(chosen, ends, strict=True):
            computed[index] = end
    assert computed == lengths
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(torch.cat(actual), wanted, atol=1e-5, rtol=1e-5)


def test_row_tiles_cover_all_rows_with_the_largest_that_fit() -> None:
    assert tiled.row_tiles(168, (128, 32, 8)) == [(0, 128), (128, 160), (160, 168)]
    assert tiled.row_tiles(64, (32,)) == [(0, 32), (32, 64)]


def test_the_probe_refuses_sizes_that_give_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, options = tiled.pack(random_rows(64, 48)), {"kv_heads": 1, "group": 2, "head_size": 16, "block_size": 8}
    multiply, bmm = tiled.multiply_tile, torch.bmm

    def careless(rows: Tensor, columns: Tensor, output: Tensor) -> None:
        multiply(rows, columns, output)
        if len(rows) in (4, 128):
            output += 1e-7 * output.abs()

    assert 8 in probe.find_tiling([weight], **options).rows
    monkeypatch.setattr(probe, "multiply_tile", careless)
    assert probe.find_tiling([weight], **options).rows == (32, 8)
    monkeypatch.setattr(torch, "bmm", lambda left, right: bmm(left, right) + left.shape[1] * 1e-3)
    assert probe.find_tiling([weight], **options).queries == (16,)
