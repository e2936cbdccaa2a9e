"""Which kernels compute a model on this machine.

The native ones wherever they can; plain torch on a GPU, without a compiler, and for pages of odd sizes, with one line
in the log that says why.
Knows what each of them needs; nothing of steps.
"""

from __future__ import annotations

import logging

from services.shard import kv_cache
from services.shard.kernels import graphs
from services.shard.kernels.interface import Kernels
from services.shard.kernels.native import compiler
from services.shard.kernels.native.binding import Library
from services.shard.kernels.native.kernels import PAGES as NATIVE_PAGES
from services.shard.kernels.native.kernels import PANEL, SPLIT, NativeKernels, padded
from services.shard.kernels.plain import PAGES as PLAIN_PAGES
from services.shard.kernels.plain import PlainKernels
from services.shard.models.transformer import Transformer

log = logging.getLogger(__name__)


def choose(
    model: Transformer, dtype: str, *, block_size: int, kv_memory: int, threads: int, device: str, kernels: str
) -> Kernels:
    """Makes the kernels of a model, which is theirs afterwards.

    Args:
        model: from `weights.load_model` with the same dtype.
        dtype: "float32", "bfloat16" or "int8".
        block_size: positions per block.
        kv_memory: bytes of the KV cache; see `kv_cache.capacity`.
        threads: compute threads.
        device: "cpu", "cuda" or "cuda:N".
        kernels: "native", "plain", or "auto", which takes the native ones where it can.

    Raises:
        ValueError: the native kernels are wanted and cannot be had, or the pool is too small; says why.
    """
    free = kv_cache.free_memory(device)
    reason = "the settings want it"
    if kernels != "plain":
        try:
            library = _native_library(block_size, device)
            head_size, pages = padded(model.architecture.head_size), NATIVE_PAGES[dtype]
            block_count = kv_cache.capacity(
                model.architecture, block_size, kv_memory, free, dtype=pages, head_size=head_size
            )
            return NativeKernels(library, model, dtype, block_count=block_count, block_size=block_size, threads=threads)
        except _Unavailable as unavailable:
            if kernels == "native":
                raise ValueError(f"kernels: no native ones here: {unavailable}") from unavailable
            reason = str(unavailable)
    log.warning("computing in plain torch, which is several times slower: %s", reason)
    block_count = kv_cache.capacity(model.architecture, block_size, kv_memory, free, dtype=PLAIN_PAGES[dtype])
    return PlainKernels(
        model, dtype, block_count=block_count, block_size=block_size, device=device, record=graphs.recorder(device)
    )


class _Unavailable(Exception):
    """The native kernels cannot be used; the text says why."""


def _native_library(block_size: int, device: str) -> Library:
    """The library for the best instruction set that compiler and system allow."""
    if device != "cpu":
        raise _Unavailable(f"they do not compute on {device}")
    if block_size % PANEL or SPLIT % block_size:
        raise _Unavailable(f"blocks of {block_size} positions: a multiple of {PANEL} that divides {SPLIT} is needed")
    first = ""
    for target in compiler.targets():
        try:
            return Library(compiler.build(target))
        except (compiler.CompilerMissing, RuntimeError, OSError) as error:
            first = first or f"{target.name}: {error}"
    raise _Unavailable(first)
