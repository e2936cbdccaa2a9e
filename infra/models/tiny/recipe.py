"""What is trained, on what and for how long: the numbers of a run, and nothing that computes.

Each run practises copying first, in short conversations, and reads long ones at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.shard.models.architecture import Architecture
from services.shard.models.families import llama


@dataclass(frozen=True, slots=True)
class Phase:
    """Equal steps of a run.

    Attributes:
        name: for the reader of the progress; different for each phase of a run.
        steps: how many.
        step_tokens: tokens of one step at most, padding included.
        longest: tokens of the longest conversation that is read.
        practice: share of conversations in which all is about repeating and remembering.
    """

    name: str
    steps: int
    step_tokens: int
    longest: int
    practice: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole run.

    Attributes:
        model: the shape of the model.
        phases: one after the other.
        learning_rate: of Muon (Jordan et al. 2024, scaled as by Liu et al. 2025) for the matrices of the layers and of
            AdamW (Loshchilov and Hutter 2019) for the rest; reached in `warmup_steps`, then falls linearly to zero.
        weight_decay: on the matrices of the layers.
        clip: largest norm of the gradient.
        label_smoothing: share of the target that is spread over all ids (Szegedy et al. 2016).
        held_out_rows: conversations that are measured.
        held_out_length: tokens of the longest of them.
        measure_every: steps between two measurements, which also write a checkpoint.
    """

    model: Architecture
    phases: tuple[Phase, ...]
    learning_rate: float = 5e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    label_smoothing: float = 5e-4
    held_out_rows: int = 400
    held_out_length: int = 1408
    measure_every: int = 200
    seed: int = 1

    def rate(self, phase: int, step: int) -> float:
        """Learning rate of a step of a phase."""
        tokens = [item.steps * item.step_tokens for item in self.phases]
        left = sum(tokens[phase:]) - step * self.phases[phase].step_tokens
        warmup = 1.0 if phase else min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * min(warmup, left / sum(tokens))


def full(scale: float = 1.0) -> Recipe:
    """The built-in model: 4.5 million parameters, about 100 minutes on two CPU threads.

    Args:
        scale: of the number of talking steps.
    """
    return Recipe(
        model=llama.architecture(
            vocabulary_size=4096,
            hidden_size=256,
            intermediate_size=640,
            layer_count=5,
            head_count=4,
            kv_head_count=2,
            head_size=64,
            context_length=2048,
            tied_embeddings=True,
        ),
        phases=(
            Phase("practice", math.ceil(1500 * scale), step_tokens=4096, longest=512, practice=0.6),
            Phase("talk", math.ceil(9000 * scale), step_tokens=4096, longest=512, practice=0.1),
            Phase("long talk", math.ceil(5000 * scale), step_tokens=5632, longest=1408, practice=0.1),
        ),
    )


def quick() -> Recipe:
    """A run of seconds that shows that everything works; its model can say nothing."""
    return Recipe(
        model=llama.architecture(
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
        phases=(
            Phase("practice", 15, step_tokens=512, longest=128, practice=0.5),
            Phase("talk", 60, step_tokens=512, longest=256),
        ),
        learning_rate=1e-2,
        warmup_steps=5,
        held_out_rows=8,
        held_out_length=256,
        measure_every=35,
    )
