"""What a model asks of whoever computes for it.

A model (`models/`) says which operations follow each other; an `Operations` says how each is computed: for training
and as the reference (`dense.py`), or for serving, in fixed tiles over pages of the KV cache (`tiled.py`). Leading
dimensions are written `...`: [B, T] in training, [rows] in serving.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Operations(Protocol):
    """The operations of a decoder-only transformer."""

    def linear(self, rows: Tensor, weight: Tensor) -> Tensor:
        """`rows @ weight.T`: [..., K] and [N, K] give [..., N]."""
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

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal grouped-query attention of each row over its own sequence, itself included.

        Args:
            layer: index of the layer, whose keys and values an implementation may keep.
            query: [..., heads, D].
            key: [..., kv_heads, D], rotated.
            value: [..., kv_heads, D].

        Returns:
            [..., heads * D].
        """
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` (Shazeer 2020): [..., 2I], gate first, gives [..., I]."""
        ...
