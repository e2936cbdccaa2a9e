"""What the measurements of engines say: rates, ratios, and shares of what the machine could do. Pure.

The limit of a step (the "roofline", Williams et al. 2009) is the larger of the bytes that must be read divided by the
bandwidth, and of the operations divided by the peak of the cores. Counted are, for decode, all weights once (an
embedding that is the head, too, once) and the keys and values of the mean context, prompt + half of the output, of each
sequence; 2 operations per weight and token, and attention's. For prefill the layers and attention over half of the
prompt on average, no head.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from tests.bench.peers.shapes import Shape

QUIET = 0.15
"""Cores that others may use while an engine is measured."""

KV_BYTES = {"bf16": 2, "fp32": 4, "int8": 2}


class Kind(StrEnum):
    """What is measured."""

    DECODE = "decode"
    PREFILL = "prefill"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What an engine is asked for: so many prompts of so many tokens, and so many tokens of output for each."""

    kind: Kind
    batch: int
    prompt: int
    tokens: int = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
        model, precision, engine: what was measured.
        run: when its run began.
        round: number of the round within the run.
        task: what it was asked for.
        first_seconds: for one token of output per prompt.
        seconds: for all tokens of output; 0 for prefill.
        bandwidth: gigabytes per second just before, of a set far larger than the caches are meant to be.
        near_bandwidth: the same of a set as large as what one step reads.
        foreign: cores that others used meanwhile.
    """

    model: str
    precision: str
    engine: str
    run: str
    round: int
    task: Task
    first_seconds: float
    seconds: float
    bandwidth: float
    near_bandwidth: float
    foreign: float

    @property
    def step_seconds(self) -> float:
        """Of one step of decode; of the whole prompt for prefill."""
        if self.task.kind is Kind.PREFILL:
            return self.first_seconds
        return (self.seconds - self.first_seconds) / (self.task.tokens - 1)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return (self.task.batch * (self.task.prompt if self.task.kind is Kind.PREFILL else 1)) / self.step_seconds

    @property
    def is_quiet(self) -> bool:
        """Whether nobody else disturbed it."""
        return self.foreign <= QUIET


def quiet_or_all(rows: Iterable[Row]) -> list[Row]:
    """The quiet rows; all of them where none is."""
    rows = list(rows)
    return [row for row in rows if row.is_quiet] or rows


def ratios(rows: Iterable[Row], engine: str, others: Iterable[str]) -> list[float]:
    """Rate of an engine divided by that of the fastest of the others, for each round in which both were quiet.

    Args:
        rows: of one model, precision and task.
        engine: whose rates are above the line.
        others: which engines count.
    """
    rounds: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.is_quiet:
            rounds[row.run, row.round][row.engine] = row.rate
    counted = set(others)
    found = []
    for rates in rounds.values():
        against = [rate for name, rate in rates.items() if name in counted]
        if engine in rates and against:
            found.append(rates[engine] / max(against))
    return found


def weight_bytes(shape: Shape, precision: str) -> float:
    """Bytes per weight; int8 has a float32 scale per row of each matrix."""
    return {"bf16": 2.0, "fp32": 4.0, "int8": 1.0 + 4.0 / shape.hidden_size}[precision]


def step_bytes(shape: Shape, precision: str, task: Task) -> float:
    """Bytes that one step reads at least."""
    layers = shape.layer_parameters * weight_bytes(shape, precision)
    if task.kind is Kind.PREFILL:
        return layers
    context = task.prompt + task.tokens / 2
    head = shape.embedding_parameters * weight_bytes(shape, precision)
    return layers + head + task.batch * context * shape.kv_values * KV_BYTES[precision]


def step_operations(shape: Shape, task: Task) -> float:
    """Operations that one step needs at least; a multiplication with its addition is two."""
    query_width = shape.num_hidden_layers * shape.num_attention_heads * shape.head_size
    if task.kind is Kind.PREFILL:
        tokens = task.batch * task.prompt
        return 2.0 * shape.layer_parameters * tokens + 4.0 * query_width * tokens * task.prompt / 2
    context = task.prompt + task.tokens / 2
    return task.batch * (2.0 * (shape.layer_parameters + shape.embedding_parameters) + 4.0 * query_width * context)


def limit_seconds(shape: Shape, row: Row, bandwidth: float, peak: Mapping[str, float]) -> float:
    """Seconds that the row's step takes at least, with so many gigabytes and operations (10⁹) per second."""
    memory = step_bytes(shape, row.precision, row.task) / (1e9 * bandwidth)
    if row.precision not in peak:
        return memory
    return max(memory, step_operations(shape, row.task) / (1e9 * peak[row.precision]))


def shares(shape: Shape, rows: Iterable[Row], peak: Mapping[str, float]) -> tuple[float, float]:
    """Medians of limit ÷ measured time, with the bandwidth of the far and of the near set."""
    rows = list(rows)
    far = [limit_seconds(shape, row, row.bandwidth, peak) / row.step_seconds for row in rows]
    near = [limit_seconds(shape, row, row.near_bandwidth, peak) / row.step_seconds for row in rows]
    return statistics.median(far), statistics.median(near)
