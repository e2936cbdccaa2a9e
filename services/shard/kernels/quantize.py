"""Weights in eight bits: symmetric, one scale for each row of a matrix (as in LLM.int8, Dettmers et al. 2022).

This is the definition: a kernel that multiplies the integers is held to products with the values that `dequantize_rows`
gives. Knows no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 127


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to integers between -127 and 127, halves to even.

    Args:
        weight: float32 or bfloat16 [N, K], finite.

    Returns:
        int8 [N, K] and float32 scales [N]: the largest magnitude of the row over 127, or 1 for a row of zeros.
    """
    rows = weight.float()
    scales = rows.abs().amax(1) / _LARGEST
    scales = torch.where(scales > 0, scales, 1.0)
    return (rows / scales[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scales


def dequantize_rows(integers: Tensor, scales: Tensor) -> Tensor:
    """Float32 [N, K] from what `quantize_rows` gives."""
    return integers.float() * scales[:, None]
