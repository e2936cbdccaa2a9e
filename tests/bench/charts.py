"""Curves as a picture: a small SVG drawn by hand, both axes logarithmic. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 460, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 30, 30
_COLORS = ("#0f766e", "#7c9cc4", "#c2410c", "#a16207", "#7e22ce", "#64748b", "#be185d")
_EMPHASIS = "#111827"
_STEPS = [10.0**power * factor for power in range(-3, 7) for factor in (1, 2, 5)]

_Point = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """One diagram: series of points by name."""

    title: str
    series: Mapping[str, Sequence[_Point]]


def draw(panels: Sequence[Panel], *, emphasized: str) -> str:
    """Draws diagrams in two columns.

    Args:
        panels: at least one point in each; all values above 0.
        emphasized: name of the series that is drawn black and thick.

    Returns:
        An SVG document.
    """
    names = sorted({name for panel in panels for name in panel.series} - {emphasized})
    colors = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(names)} | {emphasized: _EMPHASIS}
    columns = min(2, len(panels))
    height = _HEIGHT * -(-len(panels) // columns)
    body = []
    for index, panel in enumerate(panels):
        x, y = index % columns * _WIDTH, index // columns * _HEIGHT
        body += [f'<g transform="translate({x},{y})">', *_panel(panel, colors, emphasized), "</g>"]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * _WIDTH} {height}"'
        ' font-family="sans-serif" font-size="11">\n'
        f'<rect width="{columns * _WIDTH}" height="{height}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _panel(panel: Panel, colors: Mapping[str, str], emphasized: str) -> Iterator[str]:
    points = [point for series in panel.series.values() for point in series]
    horizontal = sorted({x for x, _ in points})
    low = max((step for step in _STEPS if step <= min(y for _, y in points)), default=_STEPS[0])
    high = min((step for step in _STEPS if step >= max(y for _, y in points) and step > low), default=_STEPS[-1])

    def place(point: _Point) -> _Point:
        return (
            _LEFT + (_WIDTH - _LEFT - _RIGHT) * _share(point[0], horizontal[0], horizontal[-1]),
            _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * _share(point[1], low, high),
        )

    yield f'<text x="{_LEFT}" y="18" font-weight="bold">{panel.title}</text>'
    for step in (step for step in _STEPS if low <= step <= high):
        x, y = place((horizontal[0], step))
        yield f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#e5e7eb"/>'
        yield f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{step:g}</text>'
    for tick in horizontal:
        x, y = place((tick, low))
        yield f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle" fill="#555">{tick:g}</text>'
    for index, (name, series) in enumerate(panel.series.items()):
        color, width = colors[name], 2.4 if name == emphasized else 1.2
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, series))
        yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>'
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>' for x, y in map(place, series))
        yield f'<text x="{_LEFT + 8}" y="{_TOP + 14 + 14 * index}" fill="{color}">{name}</text>'


def _share(value: float, low: float, high: float) -> float:
    """Where a value lies between two, on a logarithmic axis."""
    return math.log(value / low) / math.log(high / low) if high > low else 0.5
