"""CUDA graphs of decoding: one launch for a step instead of some fifty per layer.

Each bucket (`buckets.py`) has a graph of its own, recorded when it is first needed. A graph is used only after it has
given, on its first batch, the bits of the same step without it; one that is refused costs time, never bits.
Knows plans, and a function that computes one; nothing of models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from services.shard.kernels.buckets import MOST_ROWS, Bucket, bucket_of
from services.shard.kernels.plan import StepPlan, Tiling
from services.shard.kernels.transfer import pack, unpack

if TYPE_CHECKING:
    from services.shard.scheduler import Batch

log = logging.getLogger(__name__)

Outputs: TypeAlias = tuple[Tensor, Tensor]
"""The residual stream [P, H] and the logits of the drawn rows [P, V]."""

Recorder: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function asks of the device, without doing it; gives a function that does it."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """A recorded step.

    Attributes:
        packed: where its index arrays lie on the device, as `pack` makes them.
        plan: views of them.
        outputs: where its outputs are put.
        replay: does it.
    """

    packed: Tensor
    plan: StepPlan
    outputs: Outputs
    replay: Callable[[], None]


class DecodeGraphs:
    """The graphs of a model, by bucket.

    Args:
        compute: computes a plan that is on the device, and waits for nothing.
        device: "cuda" or "cuda:N".
        record: see `Recorder`.
    """

    def __init__(self, compute: Callable[[StepPlan], Outputs], device: str, record: Recorder) -> None:
        self._compute, self._device, self._record = compute, device, record
        self._graphs: dict[Bucket, _Graph] = {}
        self._refused: set[Bucket] = set()
        self._outputs: Outputs | None = None

    def bucket(self, batch: Batch, block_size: int, tiling: Tiling) -> Bucket | None:
        """The bucket of a batch; None if it has none, or its graph was refused."""
        bucket = bucket_of(batch, block_size, tiling)
        return None if bucket in self._refused else bucket

    def run(self, bucket: Bucket, plan: StepPlan) -> tuple[StepPlan, Outputs]:
        """Computes a plan of `plan_bucket`.

        Returns:
            The plan on the device, and outputs that are valid until the next call.
        """
        packed, graph = pack(plan, self._device), self._graphs.get(bucket)
        if graph is not None:
            graph.packed.copy_(packed, non_blocking=True)
            graph.replay()
            return graph.plan, graph.outputs
        packed = packed.to(self._device, non_blocking=True)
        plan = unpack(plan, packed)
        outputs = self._compute(plan)
        graph = self._try(bucket, packed, plan, outputs)
        if graph is None:
            self._refused.add(bucket)
        else:
            self._graphs[bucket] = graph
        return plan, outputs

    def _try(self, bucket: Bucket, packed: Tensor, plan: StepPlan, expected: Outputs) -> _Graph | None:
        """Records a step that was computed just now; None if its graph cannot be had or gives other bits."""
        if self._outputs is None:  # one place for the outputs of all graphs
            hidden, logits = (part.new_zeros(MOST_ROWS, part.shape[1]) for part in expected)
            self._outputs = hidden, logits
        outputs = self._outputs[0][: len(expected[0])], self._outputs[1][: len(expected[1])]

        def work() -> None:
            for output, part in zip(outputs, self._compute(plan), strict=True):
                output.copy_(part)

        try:
            replay = self._record(work)
            replay()
        except RuntimeError as error:  # torch has no narrower one; the step is right without a graph, only slower
            log.warning("no CUDA graph for %s: %s", bucket, error)
            return None
        pairs = zip(outputs, expected, strict=True)
        if not all(torch.equal(output.view(torch.int32), part.view(torch.int32)) for output, part in pairs):
            log.warning("no CUDA graph for %s: it gives other bits", bucket)
            return None
        return _Graph(packed, plan, outputs, replay)


class CudaRecorder:
    """`Recorder` of a GPU. All graphs share their memory, as only one of them runs at a time."""

    def __init__(self, device: str) -> None:
        stream: Callable[[str], torch.cuda.Stream] = torch.cuda.Stream  # untyped
        self._pool, self._stream = torch.cuda.graph_pool_handle(), stream(device)

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.stream(before), recording:  # the outer one, as a recording that fails stays on its own stream
            work()
        replay: Callable[[], None] = graph.replay
        return replay


def recorder(device: str) -> Recorder | None:
    """The recorder of a device; None on the CPU, which has no launches."""
    return None if torch.device(device).type == "cpu" else CudaRecorder(device)
