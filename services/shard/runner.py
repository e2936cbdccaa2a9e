"""Computes a step: a batch of token ids in, logits out.

Loads the model, owns its KV cache, and joins the model (`models/`) with the kernels of serving (`kernels/`). The
numbers keep R23: a row's logits depend on the tokens before it and on the weights, and on nothing else.
Knows block tables, but not who decided them; nothing of sampling, sequences and links.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from services.common.model_folder import hash_tokenizer, model_name
from services.common.types import Fingerprint
from services.shard import kv_cache, weights
from services.shard.kernels import tiled
from services.shard.kernels.plan import StepPlan, plan_step
from services.shard.kernels.probe import find_tiling
from services.shard.scheduler import Batch, Chunk

_SELF_TEST_TOKENS = 81
"""More than one page, several query tiles, and one with a single query."""


class Runner:
    """A model in memory with its KV cache, on the CPU in float32.

    Attributes:
        block_count: blocks of the KV cache.
        vocabulary_size: number of token ids, V.
        context_length: positions that the model knows.
        fingerprint: what another replica must have in common with this one for equal tokens (R20).
    """

    def __init__(self, folder: Path, *, block_size: int, kv_memory: int, threads: int) -> None:
        """Loads the weights and allocates the pool.

        Args:
            folder: of the model.
            block_size: positions per KV block.
            kv_memory: bytes of the pool; 0 takes 25 % of the free memory, at most 1 GiB.
            threads: compute threads, of the whole process.

        Raises:
            ValueError: the model is not one that can be served, or the pool is too small; the message says why.
        """
        torch.set_num_threads(threads)
        self._model = weights.load_model(folder).pack(tiled.pack)
        config = self._model.config
        self.vocabulary_size, self.context_length = config.vocabulary_size, config.context_length
        self._block_size = block_size
        self.block_count = kv_cache.capacity(config, block_size, kv_memory, kv_cache.free_memory())
        self._cache = kv_cache.KeyValueCache(
            config.layer_count, self.block_count, block_size, config.kv_head_count, config.head_size
        )
        with torch.inference_mode():
            self._tiling = find_tiling(
                self._model.linear_weights(),
                kv_heads=config.kv_head_count,
                group=config.head_count // config.kv_head_count,
                head_size=config.head_size,
                block_size=block_size,
            )
        self.fingerprint = Fingerprint(
            model=model_name(folder),
            weights=weights.hash_weights(folder),
            kernels=f"{tiled.VERSION}:{self._self_test()}",
            tokenizer=hash_tokenizer(folder),
        )

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Computes the chunks of a batch, after its copies of blocks.

        Args:
            batch: its token ids and positions are within the model's, its blocks within the pool; it may be empty.

        Returns:
            Float32 logits [number of chunks that draw, V], in the order of the chunks.
        """
        self._cache.copy(batch.copies)
        if not batch.chunks:
            return torch.empty(0, self.vocabulary_size)
        plan = plan_step(batch, self._block_size, self._tiling)
        operations = tiled.TiledOperations(plan, self._cache, self._tiling)
        hidden: Tensor = self._model(plan.token_ids, plan.positions, operations)
        self._contain(plan, hidden[: plan.row_count])
        if not plan.drawn_count:
            return hidden.new_empty(0, self.vocabulary_size)
        logits = self._model.logits(hidden.index_select(0, plan.drawn_rows), operations)
        return logits[: plan.drawn_count]

    def _contain(self, plan: StepPlan, hidden: Tensor) -> None:
        """Keeps what is not finite from the pages: it would reach the next owner of the block (R22).

        A value that is not finite makes its own row's residual stream not finite, and that it stays to the last layer.
        """
        if not torch.isfinite(hidden.sum()):
            broken = ~torch.isfinite(hidden).all(-1)
            self._cache.invalidate(plan.blocks[broken], plan.slots[broken])

    def _self_test(self) -> str:
        """Hash of the logits behind fixed ids: it differs where kernels, machines or threads give other bits."""
        count = min(_SELF_TEST_TOKENS, self.context_length, self.block_count * self._block_size)
        token_ids = [(index * 7919 + 1) % self.vocabulary_size for index in range(count)]
        table = list(range(-(-count // self._block_size)))
        logits = self.forward(Batch([Chunk(0, token_ids, table, draws=True)], []))
        return hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16]
