"""The loss curve as a picture: a small SVG drawn by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 360, 56, 16, 34, 40
_Point = tuple[float, float]
_TRAINING_COLOR, _HELD_OUT_COLOR = "#7c9cc4", "#c2410c"


def draw(losses: Sequence[tuple[int, float]], perplexities: Sequence[tuple[int, float]]) -> str:
    """Draws the training loss as a line and the held-out loss as dots, over the tokens read.

    Args:
        losses: (tokens, loss in nats).
        perplexities: (tokens, perplexity); drawn as its logarithm.

    Returns:
        An SVG document; the vertical axis is logarithmic.
    """
    held_out = [(tokens, math.log(perplexity)) for tokens, perplexity in perplexities]
    values = [loss for _, loss in (*losses, *held_out)]
    # Tenth powers halved and doubled: 0.1, 0.2, 0.5, 1, 2, 5, 10.
    ticks = [10.0**power * factor for power in range(-4, 2) for factor in (1, 2, 5)]
    low = max((tick for tick in ticks if tick <= min(values)), default=ticks[0])
    high = min((tick for tick in ticks if tick >= max(values)), default=ticks[-1])
    most = max(tokens for tokens, _ in losses)

    def place(point: _Point) -> _Point:
        share = (math.log(point[1]) - math.log(low)) / (math.log(high) - math.log(low))
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * point[0] / most
        return x, _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    parts = [*_axes([tick for tick in ticks if low <= tick <= high], most, place)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, losses))
    parts.append(f'<polyline points="{path}" fill="none" stroke="{_TRAINING_COLOR}" stroke-width="1.2"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{_HELD_OUT_COLOR}"/>' for x, y in map(place, held_out)]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        ' font-family="sans-serif" font-size="12">\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )


def _axes(ticks: Sequence[float], most: int, place: Callable[[_Point], _Point]) -> Iterable[str]:
    """Grid, numbers and legend."""
    for tick in ticks:
        x, y = place((0, tick))
        yield f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#e5e7eb"/>'
        yield f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{tick:g}</text>'
    for quarter in range(5):
        x, y = place((most * quarter // 4, ticks[0]))
        yield f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle" fill="#555">{most * quarter / 4e6:.2g}</text>'
    yield f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle" fill="#555">million tokens</text>'
    yield f'<text x="{_LEFT}" y="20" fill="{_TRAINING_COLOR}">training loss (nats per token)</text>'
    yield f'<text x="{_LEFT + 220}" y="20" fill="{_HELD_OUT_COLOR}">● held-out loss</text>'
