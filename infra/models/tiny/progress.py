"""Where a run is, and the line that tells it. Knows no tensor."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from infra.models.tiny.recipe import Phase

_SHOW_SECONDS = 5.0
_SMOOTHING = 0.9


@dataclass(slots=True)
class Progress:
    """Where a run is, and what it measured on the way.

    Attributes:
        phase, step: the next step to do.
        tokens: read so far.
        seconds: spent on steps so far.
        losses: (tokens, mean loss since the last entry) of training.
        perplexities: (tokens, perplexity) of the held-out conversations.
    """

    phase: int = 0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    perplexities: list[tuple[int, float]] = field(default_factory=list)

    def tokens_left(self, phases: tuple[Phase, ...]) -> int:
        """Tokens that are still to be read, at most."""
        ahead = sum(phase.steps * phase.step_tokens for phase in phases[self.phase :])
        return ahead - self.step * phases[self.phase].step_tokens


class Meter:
    """Follows the loss of a phase and tells now and then how fast the run is.

    Attributes:
        loss: of training, smoothed; None before the first step.
    """

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self.loss: float | None = None
        self._progress, self._clock = progress, clock
        self._shown, self._shown_tokens = clock(), progress.tokens

    def add(self, loss: float) -> None:
        """Takes in the loss of a step."""
        self.loss = loss if self.loss is None else _SMOOTHING * self.loss + (1 - _SMOOTHING) * loss

    def line(self, phases: tuple[Phase, ...]) -> str | None:
        """What to show now, with the speed since it was last shown; None if that was a moment ago."""
        progress, now = self._progress, self._clock()
        if now - self._shown < _SHOW_SECONDS or self.loss is None:
            return None
        speed = (progress.tokens - self._shown_tokens) / (now - self._shown)
        self._shown, self._shown_tokens = now, progress.tokens
        phase = phases[progress.phase]
        parts = [
            f"{phase.name} {progress.step}/{phase.steps}",
            f"loss {self.loss:.3f}",
            f"{progress.tokens / 1e6:.2f} M tokens",
            f"{speed:,.0f} tokens/s",
            f"{progress.tokens_left(phases) / speed / 60:.1f} min left",
        ]
        if progress.perplexities:
            parts.append(f"held-out perplexity {progress.perplexities[-1][1]:.3f}")
        return "  ".join(parts)
