"""What a process counts: histograms with their own buckets, and figures that are read when somebody asks.

A value is counted by one bisection and two additions, many at once by one search, so it can be done for every token;
nothing is published here. `collect` gives everything as plain values, and `telemetry.py` hands them to Prometheus and
OpenTelemetry. Each histogram belongs to one thread. Knows neither of the two, nor what the figures mean.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LATENCY_BUCKETS = (
    *(round(mantissa * 10.0**exponent, 9) for exponent in range(-5, 1) for mantissa in (1, 1.5, 2, 3, 4, 5, 7)),
    10.0,
    20.0,
    60.0,
)
"""Upper bounds in seconds from 10 microseconds on, about a factor of 1.4 apart: 45 buckets."""
FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""Those of `gen_ai.server.time_to_first_token` in OpenTelemetry's semantic conventions for generative AI."""
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Upper bounds for numbers of sequences or tokens."""


class Kind(StrEnum):
    """What a figure is."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Name(NamedTuple):
    """What a metric is called.

    Attributes:
        name: with dots, as OpenTelemetry writes it.
        unit: UCUM, such as `s` or `{token}`.
        description: one sentence.
    """

    name: str
    unit: str
    description: str


class Histogram:
    """Values in buckets.

    Attributes:
        bounds: upper bounds of the buckets, inclusive; the last bucket has none.
        counts: values per bucket.
        total: sum of all values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` must rise."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def record(self, value: float) -> None:
        """Counts a value; what is below zero counts as zero."""
        value = max(value, 0.0)
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class HistogramTable:
    """Several histograms with the same buckets, for values that come many at a time.

    Attributes:
        bounds: as those of a histogram.
        counts: values per bucket [histograms, buckets].
        totals: sums of all values [histograms].
    """

    __slots__ = ("_edges", "_offsets", "bounds", "counts", "totals")

    def __init__(self, bounds: Sequence[float], histograms: int) -> None:
        """`bounds` must rise."""
        self.bounds = tuple(bounds)
        self.counts = np.zeros((histograms, len(self.bounds) + 1), dtype=np.int64)
        self.totals = np.zeros(histograms)
        self._edges = np.array(self.bounds)
        self._offsets = np.arange(histograms) * (len(self.bounds) + 1)

    def record(self, values: NDArray[np.floating[Any]]) -> None:
        """Counts a row of values [rows, histograms] for each histogram; what is below zero counts as zero."""
        values = np.maximum(values, 0.0)
        places = self._edges.searchsorted(values) + self._offsets
        # New arrays instead of changed ones: another thread may be reading.
        self.counts = self.counts + np.bincount(places.ravel(), minlength=self.counts.size).reshape(self.counts.shape)
        self.totals = self.totals + values.sum(axis=0)


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric with one set of attributes, as it stands now.

    Attributes:
        value: of a counter or gauge.
        bounds, counts, total: of a histogram; see there.
    """

    name: Name
    kind: Kind
    attributes: Mapping[str, str]
    value: float = 0.0
    bounds: Sequence[float] = ()
    counts: Sequence[int] = ()
    total: float = 0.0


class Metrics:
    """All figures of a process."""

    def __init__(self) -> None:
        self._histograms: list[tuple[Name, Mapping[str, str], Histogram]] = []
        self._tables: list[tuple[Sequence[tuple[Name, Mapping[str, str]]], HistogramTable]] = []
        self._read: list[tuple[Name, Kind, Mapping[str, str], Callable[[], float]]] = []

    def histogram(self, name: Name, bounds: Sequence[float], **attributes: str) -> Histogram:
        """A new histogram, to be kept and recorded to."""
        made = Histogram(bounds)
        self._histograms.append((name, attributes, made))
        return made

    def table(self, columns: Sequence[tuple[Name, Mapping[str, str]]], bounds: Sequence[float]) -> HistogramTable:
        """New histograms, by name and attributes, to be kept and recorded to together."""
        made = HistogramTable(bounds, len(columns))
        self._tables.append((columns, made))
        return made

    def counter(self, name: Name, read: Callable[[], float], **attributes: str) -> None:
        """A figure that only grows, read when it is asked for; safe on any thread."""
        self._read.append((name, Kind.COUNTER, attributes, read))

    def gauge(self, name: Name, read: Callable[[], float], **attributes: str) -> None:
        """A figure that rises and falls, read when it is asked for; safe on any thread."""
        self._read.append((name, Kind.GAUGE, attributes, read))

    def collect(self) -> list[Figure]:
        """All figures now."""
        figures = [Figure(name, kind, attributes, float(read())) for name, kind, attributes, read in self._read]
        for name, attributes, item in self._histograms:
            figures.append(_histogram(name, attributes, item.bounds, item.counts, item.total))
        for columns, table in self._tables:
            rows = zip(columns, table.counts.tolist(), table.totals.tolist(), strict=True)
            for (name, attributes), counts, total in rows:
                figures.append(_histogram(name, attributes, table.bounds, counts, total))
        return figures


def _histogram(
    name: Name, attributes: Mapping[str, str], bounds: Sequence[float], counts: Sequence[int], total: float
) -> Figure:
    return Figure(name, Kind.HISTOGRAM, attributes, bounds=bounds, counts=tuple(counts), total=total)
