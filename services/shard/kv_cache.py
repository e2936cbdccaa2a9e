"""The keys and values of all sequences, in pages.

A page is a block of `block_size` positions of one sequence; which block belongs to whom is decided by `blocks.py`.
Within a page each head is contiguous, keys transposed, so that both products of attention read whole matrices.
Every value in the pool is finite at any time: a page's slots that no position has filled yet are weighted with zero,
and zero times a value that is not finite would not be zero. `invalidate` keeps that up.

Knows tensors and block numbers; nothing of sequences, prefixes or models.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from services.shard import large_memory
from services.shard.models.architecture import Architecture

_SHARE_OF_FREE_MEMORY = 0.25
_DEFAULT_LIMIT = 1 << 30
_MOST_SEQUENCES = 64


class KeyValueCache:
    """A pool of pages: `keys[layer]` is [blocks, kv_heads, D, block_size], `values[layer]` [blocks, kv_heads,
    block_size, D].

    Attributes:
        block_count: number of blocks.
        dtype: of the pages.
    """

    def __init__(
        self,
        layers: int,
        block_count: int,
        block_size: int,
        kv_heads: int,
        head_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.block_count, self.dtype = block_count, dtype
        keys, values = (block_count, kv_heads, head_size, block_size), (block_count, kv_heads, block_size, head_size)
        self._populator: large_memory.Populator | None = None
        if device != "cpu":
            self.keys, self.values = (
                [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)] for shape in (keys, values)
            )
        else:  # `torch.zeros` would write all of it at once
            memories = [large_memory.zeros(dtype.itemsize * math.prod(keys)) for _ in range(2 * layers)]
            pools = [torch.frombuffer(memory, dtype=dtype) for memory in memories]
            self.keys = [pool.view(keys) for pool in pools[::2]]
            self.values = [pool.view(values) for pool in pools[1::2]]
            self._populator = large_memory.Populator(memories, block_count)

    def reach(self, block: int) -> None:
        """Says that the blocks up to this one are in use, so that the memory of the next ones can be made ready."""
        if self._populator:
            self._populator.reach(block)

    def write(self, layer: int, blocks: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores key and value [R, kv_heads, D] of R positions, given by block and slot (int64 [R])."""
        self.keys[layer][blocks, :, :, slots] = key.to(self.dtype)
        self.values[layer][blocks, :, slots] = value.to(self.dtype)

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies blocks (source, target) in all layers; no target is a source or twice a target."""
        if not copies:
            return
        device = self.keys[0].device
        pairs = torch.tensor(copies, pin_memory=device.type == "cuda")  # the host does not wait for it then
        sources, targets = pairs.to(device, non_blocking=True).unbind(1)
        for pool in (*self.keys, *self.values):
            pool[targets] = pool[sources]

    def invalidate(self, blocks: Tensor, slots: Tensor) -> None:
        """Makes positions whose computation was not finite poison their own sequence and nobody else (R22)."""
        for keys, values in zip(self.keys, self.values, strict=True):
            keys[blocks, :, :, slots] = torch.nan
            values[blocks, :, slots] = 0.0


def block_bytes(
    shape: Architecture, block_size: int, dtype: torch.dtype = torch.float32, head_size: int | None = None
) -> int:
    """Memory of one block in all layers, heads being as wide as the model has them or as kernels want them."""
    return 2 * shape.layer_count * block_size * shape.kv_head_count * (head_size or shape.head_size) * dtype.itemsize


def capacity(
    shape: Architecture,
    block_size: int,
    kv_memory: int,
    free_memory: int,
    *,
    dtype: torch.dtype = torch.float32,
    head_size: int | None = None,
) -> int:
    """Number of blocks in the pool.

    Args:
        shape: of the model.
        block_size: positions per block.
        kv_memory: bytes of the pool; 0 takes 25 % of the free memory, at most 1 GiB.
        free_memory: bytes that nobody uses.
        dtype: of the pages.
        head_size: width of a head in the pages; None takes the model's.

    Raises:
        ValueError: not even one block fits.
    """
    budget = kv_memory or min(int(free_memory * _SHARE_OF_FREE_MEMORY), _DEFAULT_LIMIT)
    size = block_bytes(shape, block_size, dtype, head_size)
    if budget < size:
        raise ValueError(f"kv_memory: {budget} bytes do not hold one block of {size} bytes")
    return min(budget // size, _MOST_SEQUENCES * -(-shape.context_length // block_size))


def free_memory(device: str = "cpu") -> int:
    """Bytes of memory that this process may still take, of the machine and of its control group, or of a device."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        free = min(free, int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no control group, or one without a limit ("max")
    return max(free, 0)
