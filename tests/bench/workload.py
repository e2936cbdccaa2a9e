"""What a benchmark runs at every level. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Streams of random prompts, greedy, end tokens ignored."""

    streams: int
    tokens: int
    prompt_tokens: int
    vocabulary_size: int
    seed: int

    @property
    def total(self) -> int:
        """Output tokens of all streams."""
        return self.streams * self.tokens

    def prompts(self) -> list[list[int]]:
        """Ids in the middle of the vocabulary, where no control token is; others in each round."""
        generator = random.Random(f"{self.seed} {self.streams}")
        low, high = self.vocabulary_size // 4, 3 * self.vocabulary_size // 4
        return [[generator.randrange(low, high) for _ in range(self.prompt_tokens)] for _ in range(self.streams)]
