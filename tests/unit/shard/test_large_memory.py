"""Large memory: zero, and resident ahead of its use without a change of content."""

from __future__ import annotations

import ctypes
import mmap
from itertools import pairwise

import pytest

from services.shard import large_memory
from services.shard.large_memory import Arena, Populator, zeros

SIZE, PARTS = 64 << 20, 32
PART = SIZE // PARTS


def resident(memory: mmap.mmap) -> int:
    """Bytes of a memory that the machine has given (mincore(2))."""
    pages = -(-len(memory) // mmap.PAGESIZE)
    vector = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None)
    assert not libc.mincore(ctypes.c_void_p(large_memory.address(memory)), ctypes.c_size_t(len(memory)), vector)
    return sum(page & 1 for page in vector) * mmap.PAGESIZE


def populates() -> bool:
    memory = zeros(4 << 20)
    populator = Populator([memory], 1)
    populator.reach(0)
    populator.wait()
    return resident(memory) >= len(memory)


needs_populate = pytest.mark.skipif(not populates(), reason="the system has no MADV_POPULATE_WRITE")


@pytest.mark.parametrize("size", [0, 1, 5000, (2 << 20) + 1])
def test_memory_is_zero_and_private(size: int) -> None:
    memory = zeros(size)
    assert len(memory) == max(size, 1) and memory[:] == bytes(len(memory))
    memory[len(memory) - 1] = 1
    assert zeros(size)[:] == bytes(len(memory))


@needs_populate
def test_memory_is_resident_ahead_of_its_use_and_grows_with_it() -> None:
    memories = [zeros(SIZE) for _ in range(4)]
    populator = Populator(memories, PARTS)
    seen = [sum(resident(memory) for memory in memories)]
    for part in range(PARTS):
        populator.reach(part)
        populator.wait()
        seen.append(sum(resident(memory) for memory in memories))
        for memory in memories:
            assert resident(memory) >= min((part + 2) * PART, SIZE), "what comes next is there"
    assert seen[0] < 4 * PART
    assert seen[1] < sum(map(len, memories)) / 2, "not all at once"
    assert seen == sorted(seen) and len(set(seen)) > 3


@needs_populate
def test_a_leap_is_followed() -> None:
    memory = zeros(SIZE)
    populator = Populator([memory], PARTS)
    populator.reach(PARTS - 1)
    populator.wait()
    assert resident(memory) >= SIZE - PART


def test_content_stays() -> None:
    memory = zeros(SIZE)
    for place in range(0, SIZE, 4093):
        memory[place] = place % 251
    populator = Populator([memory], PARTS)
    for part in range(0, PARTS, 3):
        populator.reach(part)
    populator.wait()
    assert all(memory[place] == place % 251 for place in range(0, SIZE, 4093))


def test_a_system_that_cannot_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_memory, "_POPULATE_WRITE", -1)
    memory = zeros(SIZE)
    populator = Populator([memory], PARTS)
    populator.reach(0)
    populator.wait()
    assert not memory[0]


def test_what_an_arena_gives_is_zero_apart_and_aligned() -> None:
    arena, sizes = Arena(), [1, 64, 100, 3 << 20, 70 << 20, 5, 63 << 20, 2 << 20]
    places = [arena.take(size) for size in sizes]
    assert all(place % 64 == 0 for place in places)
    spans = sorted(zip(places, sizes, strict=True))
    assert all(first + size <= second for (first, size), (second, _) in pairwise(spans))
    for place, size in spans:
        assert ctypes.string_at(place, size) == bytes(size)
    assert places[3] - places[2] < 256, "side by side, so that they share large pages"
