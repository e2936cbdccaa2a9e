"""What comes out of a step, and how busy the shard is. Pure values; `outbox.py` packs them into messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from services.common.errors import FermataError


class Admitted(NamedTuple):
    """A sequence got its blocks for the first time, `cached_tokens` of them with content."""

    link: int
    attempt: int
    cached_tokens: int


class Ended(NamedTuple):
    """A sequence ended by itself, for another reason than its stop rules, or was refused."""

    link: int
    attempt: int
    error: FermataError


@dataclass(slots=True)
class Tokens:
    """What one step drew for one link: parallel lists. See `sampling.Drawn` for the last two."""

    attempts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)

    def add(self, attempt: int, token_id: int, count: int, logprob: float, top: list[tuple[int, float]]) -> None:
        """Appends the token of one sequence, its `count`-th."""
        self.attempts.append(attempt)
        self.token_ids.append(token_id)
        self.counts.append(count)
        self.logprobs.append(logprob)
        self.top.append(top)


@dataclass(slots=True)
class Outcome:
    """What a step, or the commands between two steps, gave. `tokens` is by link."""

    admitted: list[Admitted] = field(default_factory=list)
    tokens: dict[int, Tokens] = field(default_factory=dict)
    ended: list[Ended] = field(default_factory=list)


class Load(NamedTuple):
    """How busy the scheduler is, and what it has done since the start."""

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    steps: int = 0
    drawn_tokens: int = 0
    drawing_steps: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
