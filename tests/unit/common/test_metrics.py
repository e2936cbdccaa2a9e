"""Figures are counted where they belong and read when somebody asks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from services.common.metrics import LATENCY_BUCKETS, Histogram, Kind, Metrics, Name

LATENCY = Name("fermata.token.latency", "s", "Between two tokens.")
WAITING = Name("fermata.shard.waiting", "{sequence}", "Sequences that wait.")


def test_bounds_are_inclusive_and_the_last_bucket_has_none() -> None:
    histogram = Histogram((1, 2, 4))
    for value in (0.5, 1, 1.5, 2, 4, 5, -3):
        histogram.record(value)
    assert histogram.counts == [3, 2, 1, 1]
    assert histogram.total == 0.5 + 1 + 1.5 + 2 + 4 + 5


@given(some.lists(some.tuples(some.floats(-1, 99), some.floats(-1, 99)), min_size=1))
def test_many_values_at_once_are_counted_as_one_by_one(rows: list[tuple[float, float]]) -> None:
    metrics, single = Metrics(), [Histogram(LATENCY_BUCKETS), Histogram(LATENCY_BUCKETS)]
    table = metrics.table([(LATENCY, {"part": "forward"}), (WAITING, {})], LATENCY_BUCKETS)
    table.record(np.array(rows))
    for row in rows:
        for histogram, value in zip(single, row, strict=True):
            histogram.record(value)
    figures = metrics.collect()
    assert [(figure.name, figure.attributes) for figure in figures] == [(LATENCY, {"part": "forward"}), (WAITING, {})]
    assert [list(figure.counts) for figure in figures] == [histogram.counts for histogram in single]
    assert [figure.total for figure in figures] == pytest.approx([histogram.total for histogram in single])


def test_the_buckets_rise_evenly() -> None:
    steps = [after / before for before, after in pairwise(LATENCY_BUCKETS)]
    assert min(steps) > 1.2
    assert max(steps) <= 3


def test_everything_is_collected_as_it_stands() -> None:
    metrics, waiting = Metrics(), [3]
    latency = metrics.histogram(LATENCY, (1, 2), part="forward")
    metrics.gauge(WAITING, lambda: waiting[0])
    latency.record(1.5)
    waiting[0] = 7
    gauge, histogram = metrics.collect()
    assert (gauge.name, gauge.kind, gauge.value) == (WAITING, Kind.GAUGE, 7)
    assert (histogram.attributes, histogram.counts, histogram.total) == ({"part": "forward"}, (0, 1, 0), 1.5)
    latency.record(9)
    assert histogram.counts == (0, 1, 0)
