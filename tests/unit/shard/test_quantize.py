"""Eight bits of a row."""

from __future__ import annotations

import pytest
import torch

from services.shard.kernels.quantize import dequantize_rows, quantize_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_is_half_a_step_off_at_most(dtype: torch.dtype) -> None:
    weight = torch.randn(50, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    integers, scales = quantize_rows(weight)
    assert (integers.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert torch.equal(scales, weight.float().abs().amax(1) / 127)
    assert torch.equal(integers.abs().amax(1), torch.full((50,), 127, dtype=torch.int8))
    error = (dequantize_rows(integers, scales) - weight.float()).abs()
    assert (error <= 0.5001 * scales[:, None]).all()
    assert error.max() > 0.4 * scales.min()


def test_halves_are_rounded_to_even_and_zeros_stay() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6])
    integers, scales = quantize_rows(weight)
    assert integers.tolist() == [[127, 0, 2, 2, 0, -2], [0] * 6]
    assert scales.tolist() == [1.0, 1.0]
    assert torch.equal(dequantize_rows(integers, scales)[1], torch.zeros(6))


def test_rows_are_rounded_apart() -> None:
    weight = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    apart = [quantize_rows(row[None]) for row in weight]
    integers, scales = quantize_rows(weight)
    assert torch.equal(integers, torch.cat([part for part, _ in apart]))
    assert torch.equal(scales, torch.cat([part for _, part in apart]))
    assert torch.equal(quantize_rows(1000 * weight)[0], integers)
