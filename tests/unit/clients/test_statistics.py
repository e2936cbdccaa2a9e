"""Two looks at counters become rates, latencies and shares; a process that was replaced spoils none of them."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as some

from fermata import statistics
from fermata.parts import PARTS
from fermata.statistics import OrchestratorLoad, ShardLoad, TokenizerLoad, overview
from fermata.v1 import telemetry_pb2
from fermata.v1.telemetry_pb2 import Figure, GetStatisticsResponse, Replica
from services.common import metric_names
from services.common.metrics import LATENCY_BUCKETS, Histogram, Name

BOUNDS = (0.001, 0.01, 0.1)


def counter(name: str, value: float, **attributes: str) -> Figure:
    return Figure(name=name, kind=Figure.KIND_COUNTER, value=value, attributes=attributes)


def gauge(name: str, value: float) -> Figure:
    return Figure(name=name, kind=Figure.KIND_GAUGE, value=value)


def histogram(
    name: str, counts: Sequence[int], total: float, bounds: Sequence[float] = BOUNDS, **attributes: str
) -> Figure:
    return Figure(
        name=name, kind=Figure.KIND_HISTOGRAM, bounds=bounds, counts=counts, total=total, attributes=attributes
    )


def process(service: str, *figures: Figure, pid: int = 1, address: str = "127.0.0.1:1") -> Replica:
    return Replica(service=service, address=address, node="here", pid=pid, version="0.1.0", figures=figures)


def system(*replicas: Replica) -> GetStatisticsResponse:
    return GetStatisticsResponse(replicas=replicas)


def test_the_names_are_those_that_the_services_use() -> None:
    used = {value for name, value in vars(statistics).items() if name.isupper() and isinstance(value, str)}
    known = {item.name for _, item in inspect.getmembers(metric_names) if isinstance(item, Name)}
    assert len(used) == 23
    assert used <= known


def test_rates_are_of_all_tokenizers_together() -> None:
    def tokenizer(pid: int, told: int, failed: Mapping[str, int], requests: int, streams: int) -> Replica:
        return process(
            "tokenizer",
            counter("fermata.tokens.told", told),
            *(counter("fermata.calls.failed", count, error_type=reason) for reason, count in failed.items()),
            histogram("gen_ai.server.request.duration", (0, 0, requests, 0), 9.0 * requests),
            gauge("fermata.streams", streams),
            pid=pid,
        )

    before = system(tokenizer(1, 100, {}, 1, 5), tokenizer(2, 1000, {"OVERLOADED": 3}, 0, 7))
    now = system(tokenizer(1, 300, {"INTERNAL": 1}, 4, 8), tokenizer(2, 1100, {"OVERLOADED": 4}, 1, 2))
    found = overview(before, now, 2.0)
    assert (found.tokens_per_second, found.requests_per_second, found.failed_per_second) == (150.0, 2.0, 1.0)
    assert (found.streams, found.seconds) == (10, 2.0)
    assert [replica.load for replica in found.replicas] == [TokenizerLoad(8, 100.0), TokenizerLoad(2, 50.0)]


def test_latencies_are_those_of_the_interval_alone() -> None:
    """90 values in the second bucket and 10 in the third; what was slow before does not count."""
    before = system(process("tokenizer", histogram("fermata.token.latency", (0, 0, 0, 50), 100.0)))
    now = system(process("tokenizer", histogram("fermata.token.latency", (0, 90, 10, 50), 101.0)))
    found = overview(before, now, 1.0)
    assert found.token_latency is not None
    assert found.token_latency.count == 100
    assert found.token_latency.mean == pytest.approx(0.01)
    assert found.token_latency.p50 == pytest.approx(0.001 + 0.009 * 50 / 90)
    assert found.token_latency.p90 == pytest.approx(0.01)
    assert found.token_latency.p99 == pytest.approx(0.01 + 0.09 * 9 / 10)
    assert found.time_to_first_token is None


def test_latencies_of_several_processes_are_one() -> None:
    def fast(count: int) -> Replica:
        return process("tokenizer", histogram("gen_ai.server.time_to_first_token", (count, 0, 0, 0), 0.0), pid=1)

    def slow(count: int) -> Replica:
        return process(
            "tokenizer", histogram("gen_ai.server.time_to_first_token", (0, 0, 0, count), 30.0 * count), pid=2
        )

    found = overview(system(fast(0), slow(0)), system(fast(8), slow(2)), 1.0).time_to_first_token
    assert found is not None
    assert (found.count, found.mean) == (10, 6.0)
    assert (found.p50, found.p90, found.p99) == pytest.approx((0.000625, 0.1, 0.1))


@given(some.lists(some.floats(1e-5, 19), min_size=1, max_size=200))
def test_a_percentile_is_in_the_bucket_of_the_exact_one(values: list[float]) -> None:
    recorded = Histogram(LATENCY_BUCKETS)
    for value in values:
        recorded.record(value)
    empty = histogram("fermata.token.latency", [0] * len(recorded.counts), 0.0, recorded.bounds)
    full = histogram("fermata.token.latency", recorded.counts, recorded.total, recorded.bounds)
    found = overview(system(process("tokenizer", empty)), system(process("tokenizer", full)), 1.0).token_latency
    assert found is not None
    for share, shown in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
        exact = sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]
        high = LATENCY_BUCKETS[bisect_left(LATENCY_BUCKETS, exact)]
        low = max((bound for bound in (0.0, *LATENCY_BUCKETS) if bound < high), default=0.0)
        assert low <= shown <= high * (1 + 1e-9)


def test_the_shares_of_the_parts_are_of_their_sum_and_in_order() -> None:
    def tokenizer(forward: float, wait: float) -> Replica:
        times = {"forward": forward, "wait": wait, "queue": 5.0}
        return process(
            "tokenizer", *(histogram("fermata.token.part", (1,) * 4, total, part=part) for part, total in times.items())
        )

    found = overview(system(tokenizer(1.0, 1.0)), system(tokenizer(4.0, 2.0)), 1.0)
    shares = {part: share for part, share in found.parts.items() if share}
    assert shares == {"wait": pytest.approx(0.25), "forward": pytest.approx(0.75)}
    assert list(found.parts) == list(PARTS)


def test_a_shard() -> None:
    def shard(steps: int, computed: int, drawn: int, found: int, cpu: float) -> Replica:
        return process(
            "shard",
            gauge("fermata.sequences.running", 7),
            gauge("fermata.sequences.waiting", 2),
            gauge("fermata.kv.usage", 0.25),
            histogram("fermata.step.sequences", (0, 0, 0, steps), 6.0 * steps),
            histogram("fermata.step.duration", (0, steps, 0, 0), 0.005 * steps),
            counter("fermata.tokens.computed", computed),
            counter("fermata.tokens.drawn", drawn),
            counter("fermata.prefix.tokens", found),
            counter("process.cpu.time", cpu),
            gauge("process.memory.usage", 2e8),
        )

    found = overview(system(shard(10, 1000, 500, 100, 3.0)), system(shard(30, 1720, 620, 300, 4.5)), 2.0)
    (replica,) = found.replicas
    # 200 tokens of prompts were found; of the 720 computed ones, 120 were drawn before.
    load = ShardLoad(7, 2, 0.25, pytest.approx(6.0), pytest.approx(0.005), pytest.approx(0.25))  # type: ignore[arg-type]
    assert replica.load == load
    assert (replica.cpu, replica.memory, replica.address, replica.pid) == (0.75, 200_000_000, "127.0.0.1:1", 1)


def test_an_orchestrator() -> None:
    def orchestrator(calls: int, tokens: int, lags: int, cut_off: int) -> Replica:
        return process(
            "orchestrator",
            gauge("fermata.generations", 12),
            histogram("fermata.commit.lag", (0, lags, 0, 0), 0.004 * lags),
            counter("fermata.store.calls", calls),
            counter("fermata.store.tokens", tokens),
            counter("fermata.takeovers", 3),
            gauge("fermata.store.cut_off", cut_off),
        )

    (replica,) = overview(system(orchestrator(5, 50, 5, 0)), system(orchestrator(15, 450, 15, 1)), 1.0).replicas
    load = replica.load
    assert isinstance(load, OrchestratorLoad)
    assert (load.generations, load.store_calls_per_token, load.takeovers, load.cut_off) == (12, 0.025, 3, True)
    assert load.commit_lag is not None
    assert load.commit_lag.count == 10
    assert load.commit_lag.p50 == pytest.approx(0.0055)


def test_nothing_happened() -> None:
    idle = system(process("tokenizer"), process("orchestrator"), process("shard"), process("another"))
    found = overview(idle, idle, 1.0)
    assert (found.tokens_per_second, found.token_latency, found.parts) == (0.0, None, {})
    loads = {replica.service: replica.load for replica in found.replicas}
    assert loads == {
        "another": None,
        "orchestrator": OrchestratorLoad(0, None, None, 0, False),
        "shard": ShardLoad(0, 0, 0.0, None, None, None),
        "tokenizer": TokenizerLoad(0, 0.0),
    }
    assert overview(system(), system(), 1.0).replicas == []


def busy(told: int, latencies: int, **identity: int) -> Replica:
    return process(
        "tokenizer",
        counter("fermata.tokens.told", told),
        counter("process.cpu.time", told / 100),
        histogram("fermata.token.latency", (0, latencies, 0, 0), 0.005 * latencies),
        histogram("fermata.token.part", (0, latencies, 0, 0), 0.005 * latencies, part="forward"),
        **identity,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "replacement",
    [
        busy(400, 400, pid=2),
        busy(4, 4, pid=1),
        busy(900, 4, pid=1),
        process("tokenizer", histogram("fermata.token.latency", (1, 1), 1.0, (0.5,))),
    ],
    ids=["another pid", "the same pid, as in a container", "one counter alone fell", "other buckets"],
)
def test_a_replaced_process_has_no_past(replacement: telemetry_pb2.Replica) -> None:
    staying = busy(100, 100, pid=9), busy(150, 140, pid=9)
    found = overview(system(busy(500, 500, pid=1), staying[0]), system(replacement, staying[1]), 1.0)
    assert found.tokens_per_second == 50.0
    assert found.token_latency is not None
    assert found.token_latency.count == 40
    new = next(replica for replica in found.replicas if replica.pid != 9)
    assert (new.cpu, new.load) == (None, TokenizerLoad(0, 0.0))


def test_a_process_that_left_is_gone() -> None:
    found = overview(system(busy(500, 500, pid=1), busy(1, 1, pid=2)), system(busy(11, 1, pid=2)), 1.0)
    assert [replica.pid for replica in found.replicas] == [2]
    assert found.tokens_per_second == 10.0


@given(some.lists(some.integers(0, 1000), min_size=4, max_size=4), some.lists(some.integers(0, 1000), min_size=4))
def test_no_rate_is_ever_negative(before: list[int], now: list[int]) -> None:
    def tokenizer(counts: list[int]) -> Replica:
        return process(
            "tokenizer",
            counter("fermata.tokens.told", counts[0]),
            counter("process.cpu.time", counts[1]),
            histogram("fermata.token.latency", counts[:4], float(sum(counts[:4]))),
        )

    found = overview(system(tokenizer(before)), system(tokenizer(now)), 0.5)
    assert found.tokens_per_second >= 0
    assert (found.replicas[0].cpu or 0) >= 0
    latency = found.token_latency
    assert latency is None or 0 <= latency.p50 <= latency.p90 <= latency.p99


def test_two_looks_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="need time between them"):
        overview(system(), system(), 0.0)
