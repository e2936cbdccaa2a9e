"""What is asked of whoever computes: of kernels for whole steps, and of operations by a model.

`Kernels` compute the steps of one model: in plain torch (`plain.py`), or fused in native code (`native/`), where a step
is one call. Kernels for a GPU are one more implementation.
A model (`models/`) says which operations follow each other; an `Operations` says how each is computed: for training
and as the reference (`dense.py`), or for serving, in fixed tiles over pages of the KV cache (`tiled.py`). Leading
dimensions are written `...`: [B, T] in training, [rows] in serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from services.shard.kv_cache import KeyValueCache
from services.shard.models.architecture import Activation

if TYPE_CHECKING:
    from services.shard.scheduler import Batch


class Logits(NamedTuple):
    """What a step gives.

    Attributes:
        values: float32 [number of chunks that draw, V], on the CPU, in the order of the chunks; undefined in rows that
            nobody wants.
        best: the id of the largest logit of each, the lowest such, or -1 where a logit is not finite; None from kernels
            that do not find it on the way.
        device_ns: how long the device took, in nanoseconds by its own clock; None where the host is the device.
    """

    values: Tensor
    best: list[int] | None = None
    device_ns: int | None = None


class Kernels(Protocol):
    """A model that is ready to run steps, with its KV cache.

    Attributes:
        name: says how it computes: where it differs, so may bits; part of the fingerprint (R20).
        cache: the keys and values.
    """

    name: str
    cache: KeyValueCache

    def forward(self, batch: Batch, wants_logits: Sequence[bool]) -> Logits:
        """Computes the chunks of a batch.

        Args:
            batch: at least one chunk; its copies are made already.
            wants_logits: for each chunk that draws, whether its logits are read.
        """
        ...


class Operations(Protocol):
    """The operations of a decoder-only transformer."""

    def linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`rows @ weight.T + bias`: [..., K], [N, K] and [N] give [..., N]."""
        ...

    def rms_norm(self, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Root-mean-square normalisation (Zhang and Sennrich 2019): [..., H] and [H] give [..., H]."""
        ...

    def rotary(self, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Rotary position embedding (Su et al. 2021), halves of a head paired as Llama's checkpoints have them.

        Args:
            heads: [..., heads, D].
            cosine: [..., D], both halves equal.
            sine: [..., D], the first half negated, so that the result is `heads * cosine + swapped(heads) * sine`.
        """
        ...

    def attention(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Causal grouped-query attention of each row over its own sequence, itself included.

        Args:
            layer: index of the layer, whose keys and values an implementation may keep.
            query: [..., heads, D].
            key: [..., kv_heads, D], rotated.
            value: [..., kv_heads, D].
            scale: factor of the scores.
            window: a query sees so many keys, itself included; None sees all.
            softcap: scaled scores go through `softcap`; None leaves them.

        Returns:
            [..., heads * D].
        """
        ...

    def gate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """`activation(gate) * up` (Shazeer 2020): [..., 2I], gate first, gives [..., I]."""
        ...

    def softcap(self, values: Tensor, cap: float) -> Tensor:
        """`cap * tanh(values / cap)` of each value (Bello et al. 2016)."""
        ...
