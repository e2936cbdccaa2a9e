"""The benchmark of a GPU: what it counts, that it runs from end to end on the CPU, and what it says without a GPU."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from services.shard.kernels.interface import Logits
from services.shard.kernels.plain import PlainKernels
from services.shard.models.transformer import Transformer
from services.shard.scheduler import Batch
from tests.bench import device_parity, gpu
from tests.bench.device_parity import Check
from tests.bench.peers.shapes import Shape

TINY = Shape("qwen2", 300, 64, 96, 2, 4, 2, 128, 1e-6, 1e4)


@pytest.mark.parametrize(
    ("name", "parameters", "streamed"),
    [
        ("llama-3-8b", 8_030_261_248, 2 * (8_030_261_248 - 128256 * 4096)),
        ("smollm2-135m", 134_515_008, 2 * 134_515_008),
        ("qwen2.5-0.5b", 494_032_768, 2 * 494_032_768),
    ],
)
def test_the_shapes_are_the_published_ones(name: str, parameters: int, streamed: int) -> None:
    shape = gpu.architecture(name)
    with torch.device("meta"):
        model = Transformer(shape, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    assert gpu.weight_bytes(model) == streamed + 2 * vectors  # norms and biases are float32
    assert all(matrix.dtype == torch.bfloat16 for matrix in model.linear_weights())


def test_it_runs_from_end_to_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(gpu.OF_GPU, "tiny", TINY)
    monkeypatch.setitem(gpu.COPIED, "cpu", 1 << 20)
    options = ["--shape", "tiny", "--device", "cpu", "--batches", "1", "3", "--steps", "4", "--prompt", "60"]
    assert gpu.main([*options, "--prefill", "70"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(": ok") for line in lines[:4]] == [True] * 4
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [(row["kind"], row["batch"], row["steps"]) for row in rows] == [
        ("decode", 1, 4),
        ("decode", 3, 4),
        ("prefill", 1, 5),
    ]
    weights = 4 * (300 * 64 + 64 + 2 * (64 * 128 + 128 + 64 * 64 + 3 * 64 * 96 + 2 * 64))
    position = 2 * 2 * 2 * 16 * 2
    for row in rows[:2]:
        assert row["step_gigabytes"] == pytest.approx((weights + row["batch"] * (60 + 8 + 2) * position) / 1e9)
        assert row["share"] == pytest.approx(row["step_gigabytes"] / row["step_ms"] * 1e3 / row["bandwidth"])
        assert row["rate"] == pytest.approx(row["batch"] / row["step_ms"] * 1e3)
    assert rows[2]["share"] is None and rows[2]["rate"] == pytest.approx(70 / rows[2]["step_ms"] * 1e3)
    assert all(row["device_ms"] is None and not row["graphs"] for row in rows)
    assert [line.split("  ")[0] for line in lines[-4:-1]] == ["decode, batch 1", "decode, batch 3", "prefill 70"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "no GPU here" in capsys.readouterr().err


def test_more_than_the_context_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--prompt", "2000"])
    assert "2048" in capsys.readouterr().err


@pytest.mark.parametrize(("found", "holds"), [(0.5, True), (1.0, True), (1.5, False), (math.nan, False)])
def test_a_check(found: float, holds: bool) -> None:
    check = Check("something", found, 1.0)
    assert check.holds is holds
    assert check.line().endswith("ok" if holds else "WRONG")


@pytest.mark.parametrize(("bent", "broken"), [("bfloat16", [2, 3]), ("float32", [1, 2])])
def test_parity_notices_wrong_numbers(bent: str, broken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are wrong in one precision, by more than the bound, in batches alone; the reference is float32."""
    forward = PlainKernels.forward

    def wrong(self: PlainKernels, batch: Batch, wants_logits: list[bool]) -> Logits:
        logits = forward(self, batch, wants_logits)
        off = 0.5 if len(batch.chunks) > 1 and self.cache.dtype == getattr(torch, bent) else 0.0
        return logits._replace(values=logits.values + off * torch.arange(2.0).repeat(logits.values.shape[1] // 2))

    assert all(check.holds for check in device_parity.check("cpu", with_graphs=False))
    monkeypatch.setattr(PlainKernels, "forward", wrong)
    found = device_parity.check("cpu", with_graphs=False)
    assert [index for index, check in enumerate(found) if not check.holds] == broken
    assert dataclasses.replace(found[0], found=0.0).holds
