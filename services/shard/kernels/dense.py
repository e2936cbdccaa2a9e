"""Operations on whole sequences without a cache, differentiable: for training.

Works under autocast: matrix products then run in bfloat16, while the residual stream and the norms stay float32.
Promises nothing about equal bits between shapes; serving uses `tiled.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from services.shard.models.architecture import Activation


class DenseOperations:
    """`Operations` over rows [B, T, ...] (or [T, ...]): row t attends to rows 0..t of its own sequence."""

    def linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Operations.linear`."""
        return functional.linear(rows, weight, bias)

    def rms_norm(self, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """See `Operations.rms_norm`; float32, whatever comes in."""
        return functional.rms_norm(rows.float(), weight.shape, weight, epsilon)

    def rotary(self, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """See `Operations.rotary`; rounds to the dtype of `heads`, which is bfloat16 under autocast."""
        cosine, sine = cosine.unsqueeze(-2).to(heads.dtype), sine.unsqueeze(-2).to(heads.dtype)
        return heads * cosine + torch.roll(heads, heads.shape[-1] // 2, -1) * sine

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
        """See `Operations.attention`; nothing is kept."""
        query, key, value = (heads.transpose(-3, -2).to(value.dtype) for heads in (query, key, value))
        shared = query.shape[-3] // key.shape[-3]
        if window is None and softcap is None:
            mixed = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=shared > 1
            )
        else:
            key, value = key.repeat_interleave(shared, -3), value.repeat_interleave(shared, -3)
            scores = (query @ key.transpose(-2, -1)).float() * scale
            if softcap is not None:
                scores = self.softcap(scores, softcap)
            weights = scores.masked_fill(_hidden(scores, window), -torch.inf).softmax(-1)
            mixed = weights.to(value.dtype) @ value
        return mixed.transpose(-3, -2).flatten(-2)

    def gate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """See `Operations.gate`."""
        gate, up = gate_up.chunk(2, dim=-1)
        if activation is Activation.SILU:
            return functional.silu(gate) * up
        return functional.gelu(gate, approximate="tanh") * up

    def softcap(self, values: Tensor, cap: float) -> Tensor:
        """See `Operations.softcap`."""
        return torch.tanh(values / cap) * cap


def _hidden(scores: Tensor, window: int | None) -> Tensor:
    """Which keys [T, T] each query does not see: those behind it and those before its window."""
    positions = torch.arange(scores.shape[-1], device=scores.device)
    distances = positions[:, None] - positions
    hidden = distances < 0
    return hidden if window is None else hidden | (distances >= window)
