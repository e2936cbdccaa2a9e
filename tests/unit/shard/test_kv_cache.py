"""The pool: how large it is, and what lies where."""

from __future__ import annotations

import pytest
import torch

from services.shard.kv_cache import KeyValueCache, block_bytes, capacity, free_memory
from tests.random_model import SMALL

BLOCK = 2 * 2 * 64 * 2 * 16 * 4  # K and V, layers, positions, kv heads, head size, float32
GIBIBYTE = 1 << 30


@pytest.mark.parametrize(
    ("kv_memory", "free", "blocks"),
    [
        (10 * BLOCK + 5, GIBIBYTE, 10),
        (BLOCK, 0, 1),
        (0, 40 * BLOCK, 10),
        (0, GIBIBYTE, 64 * 8),
        (GIBIBYTE, GIBIBYTE, 64 * 8),
    ],
)
def test_capacity(kv_memory: int, free: int, blocks: int) -> None:
    """A quarter of what is free or what was said, but no more than 64 sequences of the whole context."""
    assert block_bytes(SMALL, 64) == BLOCK
    assert capacity(SMALL, 64, kv_memory, free) == blocks


def test_the_default_takes_at_most_a_gibibyte() -> None:
    assert capacity(SMALL, 1 << 15, 0, 100 * GIBIBYTE) == GIBIBYTE // block_bytes(SMALL, 1 << 15)


def test_half_as_wide_pages_are_twice_as_many() -> None:
    assert block_bytes(SMALL, 64, torch.bfloat16) == BLOCK // 2
    assert capacity(SMALL, 64, 10 * BLOCK, GIBIBYTE, dtype=torch.bfloat16) == 20
    assert capacity(SMALL, 64, 10 * BLOCK, GIBIBYTE, head_size=2 * SMALL.head_size) == 5


def test_no_block_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_memory"):
        capacity(SMALL, 64, BLOCK - 1, GIBIBYTE)


def test_free_memory_is_a_number_of_bytes() -> None:
    assert 1 << 20 < free_memory() < 1 << 50


def test_copies_are_of_all_layers_and_of_nothing_else() -> None:
    cache = KeyValueCache(layers=2, block_count=5, block_size=4, kv_heads=2, head_size=6)
    pools = [*cache.keys, *cache.values]
    for pool in pools:
        pool.normal_()
    before = [pool.clone() for pool in pools]
    cache.copy([(0, 3), (0, 1)])
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(pool, old[[0, 0, 2, 0, 4]])
    cache.copy([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_lies_in_its_slot(dtype: torch.dtype) -> None:
    cache = KeyValueCache(layers=2, block_count=5, block_size=4, kv_heads=2, head_size=6, dtype=dtype)
    assert {pool.dtype for pool in (*cache.keys, *cache.values)} == {dtype}
    key, value = torch.randn(3, 2, 6), torch.randn(3, 2, 6)
    blocks, slots = torch.tensor([4, 0, 4]), torch.tensor([3, 1, 0])
    cache.write(1, blocks, slots, key, value)
    for row in range(3):
        assert torch.equal(cache.keys[1][blocks[row], :, :, slots[row]], key[row].to(dtype))
        assert torch.equal(cache.values[1][blocks[row], :, slots[row]], value[row].to(dtype))
    assert cache.keys[1].count_nonzero() == cache.values[1].count_nonzero() == 36
    assert not cache.keys[0].any()
