"""What the system did between two looks at its counters: rates, latencies, and what each process was busy with.

Pure: two answers of `fermata.v1.TelemetryService/GetStatistics` and the time between them become one `Overview`. Knows
neither calls nor clocks, nor how it is shown.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeAlias

from fermata.parts import PARTS
from fermata.v1 import telemetry_pb2

TOLD_TOKENS = "fermata.tokens.told"
STREAMS = "fermata.streams"
FAILED_CALLS = "fermata.calls.failed"
REQUEST_DURATION = "gen_ai.server.request.duration"
TOKEN_LATENCY = "fermata.token.latency"
TOKEN_PART = "fermata.token.part"
TIME_TO_FIRST_TOKEN = "gen_ai.server.time_to_first_token"
GENERATIONS = "fermata.generations"
COMMIT_LAG = "fermata.commit.lag"
STORE_CALLS = "fermata.store.calls"
STORED_TOKENS = "fermata.store.tokens"
STORE_CUT_OFF = "fermata.store.cut_off"
TAKEOVERS = "fermata.takeovers"
RUNNING = "fermata.sequences.running"
WAITING = "fermata.sequences.waiting"
KV_USAGE = "fermata.kv.usage"
STEP_SEQUENCES = "fermata.step.sequences"
STEP_DURATION = "fermata.step.duration"
COMPUTED_TOKENS = "fermata.tokens.computed"
DRAWN_TOKENS = "fermata.tokens.drawn"
PREFIX_TOKENS = "fermata.prefix.tokens"
PROCESS_CPU = "process.cpu.time"
PROCESS_MEMORY = "process.memory.usage"


@dataclass(frozen=True, slots=True)
class Latency:
    """How long something took, in seconds.

    Attributes:
        count: how often it happened.
        mean: exact.
        p50, p90, p99: percentiles, interpolated within a bucket; of what is beyond the last bound, that bound.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class TokenizerLoad:
    """What a tokenizer was busy with.

    Attributes:
        streams: calls that read a generation now.
        tokens_per_second: that readers were sent.
    """

    streams: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class OrchestratorLoad:
    """What an orchestrator was busy with.

    Attributes:
        generations: in memory now.
        commit_lag: from a token's arrival to its acknowledgement by the session store; None when there was none.
        store_calls_per_token: calls of the store per token that it acknowledged; None when there was none.
        takeovers: generations taken over from another process, since this one began.
        cut_off: the session store is out of reach.
    """

    generations: int
    commit_lag: Latency | None
    store_calls_per_token: float | None
    takeovers: int
    cut_off: bool


@dataclass(frozen=True, slots=True)
class ShardLoad:
    """What a shard was busy with.

    Attributes:
        running: sequences that have KV blocks now.
        waiting: sequences that wait for blocks now.
        kv_usage: share of the KV blocks that sequences hold now.
        batch_mean: sequences per step; None without a step.
        step_mean: seconds per step; None without a step.
        prefix_hit_share: of the prompt tokens, those that were found in the KV cache; None when there were none. What
            is computed again after a preemption counts as not found.
    """

    running: int
    waiting: int
    kv_usage: float
    batch_mean: float | None
    step_mean: float | None
    prefix_hit_share: float | None


Load: TypeAlias = TokenizerLoad | OrchestratorLoad | ShardLoad


@dataclass(frozen=True, slots=True)
class ReplicaOverview:
    """One process.

    Attributes:
        service: tokenizer, orchestrator or shard.
        address: HOST:PORT of its own.
        node: name of its machine.
        pid: process id there.
        version: of the distribution.
        cpu: of one core, 1 is all of it; None when this very process was not there at the first look.
        memory: resident bytes.
        load: what it was busy with; None of a service that is not known here.
    """

    service: str
    address: str
    node: str
    pid: int
    version: str
    cpu: float | None
    memory: int
    load: Load | None


@dataclass(frozen=True, slots=True)
class Overview:
    """What the system did in an interval. A process counts from its second look on.

    Attributes:
        seconds: length of the interval.
        tokens_per_second: that readers were sent.
        streams: calls that read a generation now.
        requests_per_second: calls for a new generation that ended.
        failed_per_second: calls that ended with an error.
        token_latency: between two tokens of a choice, as they leave the tokenizer; None when there were none.
        time_to_first_token: from a call's arrival; None when there was none.
        parts: of the time between two tokens, the share of each part in order (R25); empty when there were none.
        replicas: the processes, by service and address.
    """

    seconds: float
    tokens_per_second: float
    streams: int
    requests_per_second: float
    failed_per_second: float
    token_latency: Latency | None
    time_to_first_token: Latency | None
    parts: Mapping[str, float]
    replicas: Sequence[ReplicaOverview]


def overview(
    before: telemetry_pb2.GetStatisticsResponse, now: telemetry_pb2.GetStatisticsResponse, seconds: float
) -> Overview:
    """What the system did between two looks at it.

    Args:
        before, now: the two answers, in this order.
        seconds: between them.

    Raises:
        ValueError: there is no time between them.
    """
    if seconds <= 0:
        raise ValueError(f"two looks need time between them, not {seconds} s")
    known = {_process(replica): replica for replica in before.replicas}
    changes = [_Change(known.get(_process(replica)), replica) for replica in now.replicas]
    parts = {part: _sum(change.distribution(TOKEN_PART, part=part) for change in changes).total for part in PARTS}
    whole = sum(parts.values())
    return Overview(
        seconds=seconds,
        tokens_per_second=sum(change.grown(TOLD_TOKENS) for change in changes) / seconds,
        streams=int(sum(change.value(STREAMS) for change in changes)),
        requests_per_second=_sum(change.distribution(REQUEST_DURATION) for change in changes).count / seconds,
        failed_per_second=sum(change.grown(FAILED_CALLS) for change in changes) / seconds,
        token_latency=_sum(change.distribution(TOKEN_LATENCY) for change in changes).latency,
        time_to_first_token=_sum(change.distribution(TIME_TO_FIRST_TOKEN) for change in changes).latency,
        parts={part: total / whole for part, total in parts.items()} if whole else {},
        replicas=sorted(
            (_replica(change, seconds) for change in changes), key=lambda item: (item.service, item.address, item.pid)
        ),
    )


def _replica(change: _Change, seconds: float) -> ReplicaOverview:
    replica = change.now
    return ReplicaOverview(
        service=replica.service,
        address=replica.address,
        node=replica.node,
        pid=replica.pid,
        version=replica.version,
        cpu=change.grown(PROCESS_CPU) / seconds if change.known else None,
        memory=int(change.value(PROCESS_MEMORY)),
        load=_load(change, seconds),
    )


def _load(change: _Change, seconds: float) -> Load | None:
    match change.now.service:
        case "tokenizer":
            return TokenizerLoad(int(change.value(STREAMS)), change.grown(TOLD_TOKENS) / seconds)
        case "orchestrator":
            return OrchestratorLoad(
                generations=int(change.value(GENERATIONS)),
                commit_lag=change.distribution(COMMIT_LAG).latency,
                store_calls_per_token=_ratio(change.grown(STORE_CALLS), change.grown(STORED_TOKENS)),
                takeovers=int(change.value(TAKEOVERS)),
                cut_off=change.value(STORE_CUT_OFF) > 0,
            )
        case "shard":
            found = change.grown(PREFIX_TOKENS)
            # A sequence's drawn tokens but the last are computed as well; the rest of what is computed are prompts.
            computed = max(0.0, change.grown(COMPUTED_TOKENS) - change.grown(DRAWN_TOKENS))
            batch, step = change.distribution(STEP_SEQUENCES), change.distribution(STEP_DURATION)
            return ShardLoad(
                running=int(change.value(RUNNING)),
                waiting=int(change.value(WAITING)),
                kv_usage=change.value(KV_USAGE),
                batch_mean=_ratio(batch.total, batch.count),
                step_mean=_ratio(step.total, step.count),
                prefix_hit_share=_ratio(found, found + computed),
            )
    return None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _process(replica: telemetry_pb2.Replica) -> tuple[str, str, str, int]:
    """Names a process, as far as it can be named."""
    return replica.service, replica.node, replica.address, replica.pid


@dataclass(frozen=True, slots=True)
class _Distribution:
    """Values in buckets.

    Attributes:
        counts: how many there are up to each bound and above the one before; the last bound is infinite.
        total: their sum.
    """

    counts: Mapping[float, int] = field(default_factory=dict)
    total: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    @property
    def latency(self) -> Latency | None:
        """In figures; None of nothing."""
        count = self.count
        if not count:
            return None
        return Latency(count, self.total / count, self._quantile(0.5), self._quantile(0.9), self._quantile(0.99))

    def _quantile(self, share: float) -> float:
        """The value that `share` of all do not exceed, when those of a bucket lie evenly."""
        bounds = sorted(self.counts)
        sums = list(accumulate((self.counts[bound] for bound in bounds), initial=0))
        wanted = share * sums[-1]
        place = bisect_left(sums, wanted) - 1
        low, high = bounds[place - 1] if place else 0.0, bounds[place]
        if math.isinf(high):
            return low
        return low + (high - low) * (wanted - sums[place]) / (sums[place + 1] - sums[place])


def _sum(distributions: Iterable[_Distribution]) -> _Distribution:
    counts: dict[float, int] = {}
    total = 0.0
    for distribution in distributions:
        total += distribution.total
        for bound, count in distribution.counts.items():
            counts[bound] = counts.get(bound, 0) + count
    return _Distribution(counts, total)


_Key: TypeAlias = tuple[str, frozenset[tuple[str, str]]]


def _figures(replica: telemetry_pb2.Replica) -> dict[_Key, telemetry_pb2.Figure]:
    return {(figure.name, frozenset(figure.attributes.items())): figure for figure in replica.figures}


class _Change:
    """What one process did between two looks.

    Nothing of a process grew that was not there before, or whose counters fell because another one has its name now.

    Attributes:
        now: what it says now.
        known: it was there before.
    """

    def __init__(self, before: telemetry_pb2.Replica | None, now: telemetry_pb2.Replica) -> None:
        self.now = now
        self._figures = _figures(now)
        self._before = _figures(before) if before is not None else {}
        self.known = before is not None and not any(
            _fell(self._before[key], figure) for key, figure in self._figures.items() if key in self._before
        )

    def value(self, name: str) -> float:
        """A figure as it stands now, with all its attributes together; 0 without it."""
        return sum(figure.value for (found, _), figure in self._figures.items() if found == name)

    def grown(self, name: str) -> float:
        """By how much a counter grew, with all its attributes together."""
        if not self.known:
            return 0.0
        keys = [key for key in self._figures if key[0] == name]
        return sum(self._figures[key].value - (self._before[key].value if key in self._before else 0) for key in keys)

    def distribution(self, name: str, **attributes: str) -> _Distribution:
        """What came into a histogram."""
        key = name, frozenset(attributes.items())
        figure = self._figures.get(key)
        if not self.known or figure is None:
            return _Distribution()
        old = self._before.get(key, telemetry_pb2.Figure())
        counts = [count - (old.counts[index] if old.counts else 0) for index, count in enumerate(figure.counts)]
        return _Distribution(
            dict(zip((*figure.bounds, math.inf), counts, strict=True)), max(0.0, figure.total - old.total)
        )


def _fell(before: telemetry_pb2.Figure, now: telemetry_pb2.Figure) -> bool:
    """A figure that can only grow is smaller than before, or no longer of the same form."""
    if now.kind == telemetry_pb2.Figure.KIND_COUNTER:
        return now.value < before.value
    if now.kind == telemetry_pb2.Figure.KIND_HISTOGRAM:
        if list(now.bounds) != list(before.bounds):
            return True
        return any(count < old for count, old in zip(now.counts, before.counts, strict=True))
    return False
