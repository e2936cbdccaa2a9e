"""What rounded weights cost the built-in model: perplexity of held-out conversations, decoded by what serves them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from infra.models.tiny import tokenizer
from infra.models.tiny.batches import Batch, BatchSource
from services.config import BUILT_IN_MODEL
from services.shard import scheduler
from services.shard.runner import Runner
from services.shard.scheduler import Chunk

ROWS, LENGTH = 48, 256


@pytest.fixture(scope="module")
def held_out() -> list[Batch]:
    return BatchSource(tokenizer.ConversationEncoder(tokenizer.load()), seed=0).held_out(ROWS, LENGTH)


def perplexity(dtype: str, batches: list[Batch]) -> float:
    """Of the tokens that the assistant says; all conversations are decoded side by side."""
    runner = Runner(Path(BUILT_IN_MODEL), block_size=64, kv_memory=256 << 20, threads=1, dtype=dtype, kernels="native")
    rows = [row for batch in batches for row in zip(batch.token_ids.tolist(), batch.targets.tolist(), strict=True)]
    losses = []
    for position in range(LENGTH):
        here = [(i, ids[position], targets[position]) for i, (ids, targets) in enumerate(rows) if position < len(ids)]
        chunks = [
            Chunk(position, [token_id], list(range(4 * i, 4 * i + position // 64 + 1)), draws=True)
            for i, token_id, _ in here
        ]
        logits = runner.forward(scheduler.Batch(chunks, [])).values
        losses.append(functional.cross_entropy(logits, torch.tensor([each[2] for each in here]), reduction="sum"))
    counted = sum(target >= 0 for _, targets in rows for target in targets)
    return math.exp(float(sum(losses)) / counted)


def test_rounded_weights_cost_next_to_nothing(held_out: list[Batch]) -> None:
    exact = perplexity("float32", held_out)
    assert 1.0 < exact < 2.0
    for dtype in ("bfloat16", "int8"):
        assert abs(perplexity(dtype, held_out) / exact - 1) < 0.01, dtype
