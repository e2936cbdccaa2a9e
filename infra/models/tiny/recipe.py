"""What is trained, on what and for how long: the numbers of a run, and nothing that computes.

Each run first learns to copy (`corpus.copy_rows`), then to talk, in rows that grow longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.shard.models.config import LlamaConfig


@dataclass(frozen=True, slots=True)
class Phase:
    """Equal steps of a run.

    Attributes:
        name: for the reader of the progress.
        steps: how many at most.
        rows: of a batch.
        length: tokens of a row.
        copy_share: share of rows that are copy problems.
        enough: loss at which the phase ends early; 0 never.
        cycle: phases of a cycle share one fall of the learning rate.
    """

    name: str
    steps: int
    rows: int
    length: int
    copy_share: float = 0.0
    enough: float = 0.0
    cycle: int = 0

    @property
    def only_copies(self) -> bool:
        """Whether this is a part of the copy curriculum."""
        return self.copy_share == 1.0

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.rows * self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole run.

    Attributes:
        model: the shape of the model.
        phases: one after the other; those that only copy come first.
        learning_rate: of AdamW (Loshchilov and Hutter 2019) for talking; reached in `warmup_steps`, then falls
            linearly to zero. A further cycle begins again with half of it (Loshchilov and Hutter 2017).
        copy_learning_rate: constant during the copy curriculum.
        weight_decay: on matrices.
        clip: largest norm of the gradient.
        held_out_rows, held_out_length: the conversations that are measured.
        measure_every: steps between two measurements, which also write a checkpoint.
    """

    model: LlamaConfig
    phases: tuple[Phase, ...]
    learning_rate: float = 3e-3
    copy_learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    held_out_rows: int = 32
    held_out_length: int = 1024
    measure_every: int = 200
    seed: int = 1

    def rate(self, phase: int, step: int) -> float:
        """Learning rate of a step of a phase."""
        item = self.phases[phase]
        if item.only_copies:
            return self.copy_learning_rate * min(1.0, (step + 1) / self.warmup_steps)
        same_cycle = [other.cycle == item.cycle and not other.only_copies for other in self.phases]
        tokens = [
            counts * other.steps * other.step_tokens for counts, other in zip(same_cycle, self.phases, strict=True)
        ]
        left = sum(tokens[phase:]) - step * item.step_tokens
        warmup = 1.0 if sum(tokens[:phase]) else min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * 0.5**item.cycle * min(warmup, left / sum(tokens))


def full(scale: float = 1.0) -> Recipe:
    """The built-in model: 2.95 million parameters, about half an hour on one free CPU thread.

    Args:
        scale: of the number of talking steps.
    """
    return Recipe(
        model=LlamaConfig(
            vocabulary_size=3072,
            hidden_size=192,
            intermediate_size=512,
            layer_count=6,
            head_count=6,
            kv_head_count=2,
            head_size=32,
            context_length=2048,
            tied_embeddings=True,
        ),
        phases=(
            Phase("copy", 600, rows=32, length=128, copy_share=1.0),
            Phase("copy in small steps", 2000, rows=8, length=128, copy_share=1.0, enough=0.5),
            Phase("talk", math.ceil(1100 * scale), rows=6, length=384, copy_share=0.05),
            Phase("long talk", math.ceil(300 * scale), rows=4, length=1024, copy_share=0.02),
            Phase("longest talk", math.ceil(25 * scale), rows=3, length=2048),
            Phase("talk again", math.ceil(1000 * scale), rows=4, length=640, copy_share=0.05, cycle=1),
            Phase("long talk again", math.ceil(250 * scale), rows=4, length=1024, cycle=1),
        ),
    )


def quick() -> Recipe:
    """A run of seconds that shows that everything works; its model can say nothing."""
    return Recipe(
        model=LlamaConfig(
            vocabulary_size=512,
            hidden_size=32,
            intermediate_size=64,
            layer_count=2,
            head_count=4,
            kv_head_count=2,
            head_size=8,
            context_length=256,
            tied_embeddings=True,
        ),
        phases=(Phase("copy", 10, rows=4, length=64, copy_share=1.0), Phase("talk", 60, rows=4, length=128)),
        learning_rate=1e-2,
        copy_learning_rate=1e-2,
        warmup_steps=5,
        held_out_rows=2,
        held_out_length=128,
        measure_every=35,
    )
