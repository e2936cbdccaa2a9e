"""Operations on whole sequences without a cache, differentiable: for training.

Works under autocast: matrix products then run in bfloat16, while the residual stream and the norms stay float32.
Promises nothing about equal bits between shapes; serving uses `tiled.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class DenseOperations:
    """`Operations` over rows [B, T, ...] (or [T, ...]): row t attends to rows 0..t of its own sequence."""

    def linear(self, rows: Tensor, weight: Tensor) -> Tensor:
        """See `Operations.linear`."""
        return functional.linear(rows, weight)

    def rms_norm(self, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """See `Operations.rms_norm`."""
        return functional.rms_norm(rows, weight.shape, weight, epsilon)

    def rotary(self, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """See `Operations.rotary`; rounds to the dtype of `heads`, which is bfloat16 under autocast."""
        cosine, sine = cosine.unsqueeze(-2).to(heads.dtype), sine.unsqueeze(-2).to(heads.dtype)
        return heads * cosine + torch.roll(heads, heads.shape[-1] // 2, -1) * sine

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Operations.attention`; nothing is kept."""
        query, key, value = (heads.transpose(-3, -2) for heads in (query, key, value))
        grouped = query.shape[-3] != key.shape[-3]
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return mixed.transpose(-3, -2).flatten(-2)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See `Operations.swiglu`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up
