"""How many prompt tokens a step computes beside sequences that run, so that these wait a bounded time for their next.

A step with running sequences alone takes as long as it takes, D. Prompts may take as long again, or more where they
outnumber the running sequences, since every sequence has the same claim to the machine; but never more than a budget B.
One minimal chunk goes on in any case, in a time M, so that no prompt starves. So two tokens of a running sequence are
at most D + B + M apart, and 2 D + M where prompts do not outnumber them: what a step costs besides, and what nobody
can foresee on a machine with other work, comes on top. Where nobody runs there is nobody who waits, and no limit.

What a step takes is learned from the steps that were: D as a line over the number of running sequences, from steps
without prompts, and the time of a prompt token as a line over its position, since attention reads all before it. What
is expected may be wrong, so a step computes at most twice as many prompt tokens as one of the latest did.

Pure: it is told how long steps took and has no clock. It decides when a token is computed, never which one it is (R23).
"""

from __future__ import annotations

import math

MINIMAL_CHUNK = 16
"""Prompt tokens that every step may compute: one query tile, of which a part would not be cheaper."""

_MEMORY = 0.1
"""Weight of the latest step in an average."""
_OUTLIER = 2.0
"""A step that took more than this many times what was expected counts as one that took this many times that."""
_STEEPEST = 4.0
"""Nothing is expected to be this many times cheaper than what was seen on the average."""
_SAME_SIZE = 1.5
"""Numbers of running sequences that differ by less are alike."""
_TELLING = 4 * MINIMAL_CHUNK
"""Of fewer tokens than these, computed where nobody runs, most of the time is the step's own."""
_LONGEST_BLIND = 64
"""Steps with prompts after which one without them is looked at again."""


class _Line:
    """y = intercept + slope x, neither negative, by least squares in which old points fade."""

    def __init__(self) -> None:
        self._count = 0
        self._mean_x = self._mean_y = self._variance = self._covariance = 0.0

    @property
    def slope(self) -> float:
        if self._covariance <= 0 or self._mean_y <= 0:
            return 0.0
        # A spread of less than a tenth says nothing of a slope.
        slope = self._covariance / (self._variance + 0.01 * self._mean_x**2)
        return min(slope, self._mean_y / self._mean_x)

    def at(self, x: float) -> float:
        """What to expect; 0 before the first point."""
        return max(self._mean_y + self.slope * (x - self._mean_x), self._mean_y / _STEEPEST, 0.0)

    def learn(self, x: float, y: float) -> None:
        """Adds a point; x is not negative."""
        self._count += 1
        weight = max(_MEMORY, 1 / self._count)
        from_x, from_y = x - self._mean_x, y - self._mean_y
        self._mean_x += weight * from_x
        self._mean_y += weight * from_y
        self._variance = (1 - weight) * (self._variance + weight * from_x * from_x)
        self._covariance = (1 - weight) * (self._covariance + weight * from_x * from_y)


class Allowance:
    """What the prompts of one step may take. Made by `Pacer.allow`.

    Attributes:
        running: sequences of the step that compute one token.
        tokens: prompt tokens of the step, so far.
        positions: the sum of their positions.
    """

    def __init__(self, rates: _Line, running: int, seconds: float, least: int, most: int) -> None:
        self._rates, self._seconds, self._least, self._most = rates, seconds, least, most
        self.running, self.tokens, self.positions = running, 0, 0.0

    def size(self, wanted: int, start: int) -> int:
        """How many of `wanted` tokens from position `start` on may be computed; 0 when the step has enough.

        Where not all of them fit, they are whole query tiles.
        """
        if self._seconds == math.inf:
            return wanted
        fitting = min(self._fitting(start), self._most - self.tokens)
        if fitting >= wanted:
            return wanted
        return min(wanted, max(fitting - fitting % MINIMAL_CHUNK, self._least - self.tokens))

    def spend(self, size: int, start: int) -> None:
        """Counts `size` tokens from position `start` on."""
        middle = start + (size - 1) / 2
        self.tokens += size
        self.positions += size * middle
        self._seconds -= size * self._rates.at(middle)

    def _fitting(self, start: int) -> int:
        """The most tokens whose time is left: n with n (rate + n slope / 2) = seconds."""
        rate, slope = self._rates.at(start), self._rates.slope
        if self._seconds <= 0 or not rate:
            return 0
        return int(2 * self._seconds / (rate + math.sqrt(rate * rate + 2 * slope * self._seconds)))


class Pacer:
    """Knows how long steps take, and what their prompts may.

    Args:
        budget: seconds of a step that has prompts beside running sequences; 0 sets no limit.
    """

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self._steps = _Line()  # seconds of a step without prompts, by running sequences
        self._rates = _Line()  # seconds of a prompt token, by its position
        self._seen_running = 0
        self._dared = float(MINIMAL_CHUNK)  # prompt tokens beside running sequences, the most of late
        self._blind = 0  # steps with prompts since one without them
        self._looks = False  # this step has none, so that it can be seen what it takes

    def allow(self, running: int, prompts: int) -> Allowance:
        """What a step may compute of prompts.

        Args:
            running: sequences that compute one token in this step.
            prompts: sequences that would compute more in it.
        """
        if not running or not self._budget:
            return Allowance(self._rates, running, math.inf, 0, 0)
        self._looks = prompts > 0 and not self._looks and self._must_look(running)
        if self._looks:
            return Allowance(self._rates, running, 0.0, 0, 0)
        alone = self._steps.at(running)
        seconds = min(self._budget, alone * max(1.0, prompts / running))
        return Allowance(self._rates, running, seconds, MINIMAL_CHUNK, int(2 * self._dared))

    def learn(self, allowance: Allowance, seconds: float) -> None:
        """Takes note of how long the step of an allowance took; 0 when nobody knows."""
        if not seconds or not self._budget:
            return
        running, tokens = allowance.running, allowance.tokens
        if tokens and (running or tokens >= _TELLING):
            self._blind += 1
            position = allowance.positions / tokens
            alone = 0.0
            if running:
                self._dared = max(tokens, 0.9 * self._dared, MINIMAL_CHUNK)
                alone = self._steps.at(running)
            seconds = _tamed(seconds, alone + tokens * self._rates.at(position))
            self._rates.learn(position, (seconds - alone) / tokens)
        elif running:
            self._blind, self._seen_running = 0, running
            self._steps.learn(running, _tamed(seconds, self._steps.at(running)))

    def _must_look(self, running: int) -> bool:
        """Whether it is not known, or no longer, what so many running sequences take alone."""
        alike = self._seen_running / _SAME_SIZE < running < self._seen_running * _SAME_SIZE
        return not alike or self._blind >= _LONGEST_BLIND


def _tamed(seconds: float, expected: float) -> float:
    return min(seconds, _OUTLIER * expected) if expected else seconds
