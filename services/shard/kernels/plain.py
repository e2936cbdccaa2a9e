"""A model in plain torch, on the CPU or on a GPU: what the other kernels are held to, and what is there without them.

Knows a model and the layout of its steps; nothing of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from services.shard.kernels import tiled
from services.shard.kernels.buckets import plan_bucket
from services.shard.kernels.graphs import DecodeGraphs, Outputs, Recorder
from services.shard.kernels.interface import Logits
from services.shard.kernels.plan import StepPlan, plan_step
from services.shard.kernels.probe import find_tiling
from services.shard.kernels.transfer import fetch, move, timer_of
from services.shard.kv_cache import KeyValueCache
from services.shard.models.transformer import Transformer
from services.shard.scheduler import Batch

PAGES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
"""What keys and values are kept in."""


class PlainKernels:
    """`Kernels` that compute in fixed tiles (`tiled.py`).

    On a GPU the host waits once per step, for the results: the index arrays go in one transfer, of rows that are drawn
    greedily only the token comes back, and a batch that only decodes is a CUDA graph where it has one. What a GPU
    could do better is attention: pages are gathered, and added up in as many launches as the longest sequence has.

    Attributes:
        name: see `Kernels`.
        cache: see `Kernels`.
    """

    name = tiled.VERSION

    def __init__(
        self,
        model: Transformer,
        dtype: str,
        *,
        block_count: int,
        block_size: int,
        device: str,
        record: Recorder | None = None,
    ) -> None:
        """Moves the model to where it computes and finds the tiles of this machine.

        Args:
            model: from `weights.load_model` with the same dtype.
            dtype: "float32", "bfloat16" or "int8".
            block_count: blocks of the KV cache.
            block_size: positions per block.
            device: "cpu", "cuda" or "cuda:N".
            record: makes graphs of steps that only decode (`graphs.recorder`); None computes without.
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
        self._timer = timer_of(device)
        self._graphs = None if record is None else DecodeGraphs(self._compute, device, record)

    @torch.inference_mode()
    def forward(self, batch: Batch, wants_logits: Sequence[bool]) -> Logits:
        """See `Kernels.forward`."""
        plan, (hidden, logits) = self._launch(batch)
        hidden = hidden[: plan.row_count]
        results = fetch(hidden.sum().isfinite(), logits[: len(wants_logits)], wants_logits, self._device)
        device_ns = self._timer.stop()
        finite, *best = results.numbers.tolist()
        if not finite:
            self._contain(plan, hidden)
        return Logits(results.values, best or None, device_ns)

    def _launch(self, batch: Batch) -> tuple[StepPlan, Outputs]:
        """Starts a step; the plan is given as it is on the device."""
        layout = self._block_size, self._tiling
        windows = self._model.architecture.windows
        bucket = None if self._graphs is None else self._graphs.bucket(batch, *layout)
        if self._graphs is None or bucket is None:
            plan = plan_step(batch, *layout, windows)
            self._timer.start()
            plan = move(plan, self._device)
            return plan, self._compute(plan)
        plan = plan_bucket(batch, bucket, *layout, windows)
        self._timer.start()
        return self._graphs.run(bucket, plan)

    def _compute(self, plan: StepPlan) -> Outputs:
        """The residual stream and the logits of a plan, without waiting for the device anywhere."""
        operations = tiled.TiledOperations(plan, self.cache, self._tiling)
        hidden: Tensor = self._model(plan.token_ids, plan.positions, operations)
        return hidden, self._model.logits(hidden.index_select(0, plan.drawn_rows), operations)

    def _contain(self, plan: StepPlan, hidden: Tensor) -> None:
        """Keeps what is not finite from the pages: it would reach the next owner of the block (R22).

        A value that is not finite makes its own row's residual stream not finite, and that it stays to the last layer.
        """
        broken = ~torch.isfinite(hidden).all(-1)
        self.cache.invalidate(plan.blocks[broken], plan.slots[broken])
