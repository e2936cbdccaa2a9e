"""A model in plain torch, on the CPU or on a GPU: what the other kernels are held to, and what is there without them.

Knows a model and the layout of its steps; nothing of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from services.shard.kernels import tiled
from services.shard.kernels.interface import Logits
from services.shard.kernels.plan import StepPlan, move, plan_step
from services.shard.kernels.probe import find_tiling
from services.shard.kv_cache import KeyValueCache
from services.shard.models.transformer import Transformer
from services.shard.scheduler import Batch

PAGES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
"""What keys and values are kept in."""


class PlainKernels:
    """`Kernels` that compute in fixed tiles (`tiled.py`).

    Attributes:
        name: see `Kernels`.
        cache: see `Kernels`.
    """

    name = tiled.VERSION

    def __init__(self, model: Transformer, dtype: str, *, block_count: int, block_size: int, device: str) -> None:
        """Moves the model to where it computes and finds the tiles of this machine.

        Args:
            model: from `weights.load_model` with the same dtype.
            dtype: "float32", "bfloat16" or "int8".
            block_count: blocks of the KV cache.
            block_size: positions per block.
            device: "cpu", "cuda" or "cuda:N".
        """
        shape = model.architecture
        self._model = model.to(device).map_linear_weights(tiled.pack)
        self._block_size, self._device = block_size, device
        self.cache = KeyValueCache(
            shape.layer_count,
            block_count,
            block_size,
            shape.kv_head_count,
            shape.head_size,
            dtype=PAGES[dtype],
            device=device,
        )
        with torch.inference_mode():
            self._tiling = find_tiling(
                self._model.linear_weights(),
                kv_heads=shape.kv_head_count,
                group=shape.head_count // shape.kv_head_count,
                head_size=shape.head_size,
                block_size=block_size,
            )

    @torch.inference_mode()
    def forward(self, batch: Batch, wants_logits: Sequence[bool]) -> Logits:
        """See `Kernels.forward`."""
        windows = self._model.architecture.windows
        plan = move(plan_step(batch, self._block_size, self._tiling, windows), self._device)
        operations = tiled.TiledOperations(plan, self.cache, self._tiling)
        hidden: Tensor = self._model(plan.token_ids, plan.positions, operations)
        self._contain(plan, hidden[: plan.row_count])
        if not wants_logits:
            return Logits(torch.empty(0, self._model.architecture.vocabulary_size))
        logits = self._model.logits(hidden.index_select(0, plan.drawn_rows), operations)
        return Logits(logits[: plan.drawn_count].cpu())

    def _contain(self, plan: StepPlan, hidden: Tensor) -> None:
        """Keeps what is not finite from the pages: it would reach the next owner of the block (R22).

        A value that is not finite makes its own row's residual stream not finite, and that it stays to the last layer.
        """
        if not torch.isfinite(hidden.sum()):
            broken = ~torch.isfinite(hidden).all(-1)
            self.cache.invalidate(plan.blocks[broken], plan.slots[broken])
