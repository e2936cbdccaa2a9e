"""Whether the kernels of a device compute what the CPU does in float32, and whether a row there stands alone (R23).

A small random model, three sequences: prompts in one step, then steps that only decode, fed with fixed tokens so that
all computations see the same input. Knows no benchmark.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.shard.kernels import graphs
from services.shard.kernels.plain import PlainKernels
from services.shard.models.transformer import Transformer
from services.shard.scheduler import Batch, Chunk
from tests.random_model import random_model, small

SHAPE = small(
    vocabulary_size=512, hidden_size=256, intermediate_size=512, head_count=8, head_size=64, context_length=256
)
BLOCK_SIZE, BLOCKS = 64, 16
PROMPTS, STEPS = (100, 37, 63), 6
"""Of one of the sequences a page begins while it decodes."""

BOUNDS = {"float32": 1e-3, "bfloat16": 0.25}
"""What the largest difference of a logit may be; the logits have a standard deviation of about 1.5."""


@dataclass(frozen=True)
class Check:
    """One promise.

    Attributes:
        name: of what.
        found: the measured figure.
        bound: what it may be at most.
    """

    name: str
    found: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether it is kept; a figure that is no number does not."""
        return self.found <= self.bound

    def line(self) -> str:
        """For a terminal."""
        return f"parity: {self.name}: {self.found:.2g}, at most {self.bound:.2g}: {'ok' if self.holds else 'WRONG'}"


def check(device: str, *, with_graphs: bool) -> list[Check]:
    """Holds a device to the CPU in both precisions, and each of its rows to itself in a larger batch."""
    everyone = range(len(PROMPTS))
    checks = []
    for dtype, bound in BOUNDS.items():
        expected = _logits(_kernels("float32", "cpu", rounded=dtype == "bfloat16"), everyone)
        kernels = _kernels(dtype, device, rounded=dtype == "bfloat16", with_graphs=with_graphs)
        together = _logits(kernels, everyone)
        alone = torch.cat([_logits(kernels, [index]) for index in everyone], 1)
        differing = float((together.view(torch.int32) != alone.view(torch.int32)).sum())
        checks.append(Check(f"{dtype}, largest difference to the CPU", float((together - expected).abs().max()), bound))
        checks.append(Check(f"{dtype}, logits that are others in a batch", differing, 0.0))
    return checks


def _kernels(dtype: str, device: str, *, rounded: bool, with_graphs: bool = False) -> PlainKernels:
    """A model whose matrices are those of all others with the same `rounded`, whatever they are kept in."""
    source = random_model(SHAPE).checkpoint_views()
    model = Transformer(SHAPE, torch.bfloat16 if dtype == "bfloat16" else torch.float32).requires_grad_(False)
    for name, view in model.checkpoint_views().items():
        matrix = rounded and view.dim() == 2
        view.copy_(source[name].bfloat16() if matrix else source[name])
    record = graphs.recorder(device) if with_graphs else None
    return PlainKernels(model, dtype, block_count=BLOCKS, block_size=BLOCK_SIZE, device=device, record=record)


def _logits(kernels: PlainKernels, sequences: Sequence[int]) -> Tensor:
    """Logits [1 + STEPS, sequences, V] behind the prompts and behind each decoded token."""
    dice = [random.Random(index) for index in sequences]
    prompts = [die.choices(range(SHAPE.vocabulary_size), k=PROMPTS[i]) for i, die in zip(sequences, dice, strict=True)]
    tables = [list(range(4 * index, 4 * index + 4)) for index in sequences]
    wanted = [True] * len(sequences)
    chunks = [Chunk(0, prompt, table, draws=True) for prompt, table in zip(prompts, tables, strict=True)]
    rows = [kernels.forward(Batch(chunks, []), wanted).values]
    for step in range(STEPS):
        chunks = [
            Chunk(len(prompt) + step, [die.randrange(SHAPE.vocabulary_size)], table, draws=True)
            for prompt, table, die in zip(prompts, tables, dice, strict=True)
        ]
        rows.append(kernels.forward(Batch(chunks, []), wanted).values)
    return torch.stack(rows)
