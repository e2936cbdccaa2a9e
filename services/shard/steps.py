"""The steps that a shard remembers, and the spans that they become when somebody asks.

A step is one entry of a ring, whatever its batch: nothing is made of it unless a generation that was in it is looked
at. Knows numbers and names; neither tensors nor who collects spans.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from services.common import attributes as names
from services.common.tracing import Span, since_epoch, step_context
from services.shard.engine import Timings

KEPT_STEPS = 4096
"""Steps that are remembered: two minutes at 30 per second."""


class StepRecord(NamedTuple):
    """What a step did, for whom.

    Attributes:
        number: counts the steps.
        timings: where its time went.
        generations: whose sequences were in it.
        lengths: tokens computed of each.
    """

    number: int
    timings: Timings
    generations: list[str]
    lengths: list[int]


class StepLog:
    """The last steps of a shard."""

    def __init__(self, shard: str) -> None:
        """`shard` is the process id that names it."""
        self._shard = shard
        self._records: deque[StepRecord] = deque(maxlen=KEPT_STEPS)
        self._collected: set[int] = set()

    def add(self, record: StepRecord) -> None:
        """Remembers a step; the oldest one is forgotten."""
        self._records.append(record)

    def spans(self, generation_id: str) -> Iterator[Span]:
        """The steps that a generation was in, oldest first."""
        return (self._span(record) for record in self._records if generation_id in record.generations)

    def uncollected(self, generation_id: str) -> Iterator[Span]:
        """Those of `spans` that no earlier call gave."""
        oldest = self._records[0].number if self._records else 0
        self._collected = {number for number in self._collected if number >= oldest}
        for record in self._records:
            if record.number not in self._collected and generation_id in record.generations:
                self._collected.add(record.number)
                yield self._span(record)

    def _span(self, record: StepRecord) -> Span:
        timings = record.timings
        device = {} if timings.device is None else {names.STEP_DEVICE: timings.device // 1000}
        return Span(
            "step",
            step_context(self._shard, record.number),
            b"",
            since_epoch(timings.started),
            since_epoch(timings.departed),
            attributes={
                names.SHARD: self._shard,
                names.STEP_NUMBER: record.number,
                names.STEP_TOKENS: sum(record.lengths),
                names.STEP_GENERATIONS: record.generations,
                names.STEP_LENGTHS: array("i", record.lengths),
                names.part("schedule"): timings.schedule // 1000,
                names.part("forward"): timings.forward // 1000,
                names.part("sample"): timings.sample // 1000,
                **device,
            },
        )
