"""The parts of an interval sum to it, whatever the clocks show."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as some

from services.common.timings import (
    CallMoments,
    Delivery,
    FirstMoments,
    Parts,
    StepMoments,
    TokenMoments,
    Told,
    between,
    first,
)

MOMENTS = some.integers(min_value=0, max_value=2**62)


@some.composite
def told(draw: some.DrawFn) -> Told:
    step = StepMoments(draw(some.sampled_from(("one", "other"))), *(draw(MOMENTS) for _ in range(8)))
    way = FirstMoments(*(draw(MOMENTS) for _ in range(5)))
    visible, sent, received = (draw(MOMENTS) for _ in range(3))
    moments = TokenMoments(
        draw(some.sampled_from((step, None))),
        draw(some.integers(0, 1)),
        visible,
        sent,
        received,
        draw(some.sampled_from((way, None))),
    )
    return Told(moments, Delivery(*(draw(MOMENTS) for _ in range(4))))


@given(told(), told())
def test_the_parts_sum_to_the_interval(previous: Told, current: Told) -> None:
    parts = between(previous, current)
    assert sum(parts[1:]) == parts.interval == current.delivery.departed - previous.delivery.departed


@given(told(), some.builds(CallMoments, MOMENTS, MOMENTS, MOMENTS, MOMENTS))
def test_the_parts_of_the_first_sum_to_its_time(current: Told, call: CallMoments) -> None:
    parts = first(current, call)
    assert sum(parts[1:]) == parts.interval == current.delivery.departed - call.arrived
    if call.sent and current.moments.step is not None and current.moments.first is not None:
        assert parts.unaccounted == 0


def walk(
    start: int, *, clocks: tuple[int, int, int] = (0, 0, 0), other_shard: int = 0, clock: int = 1, **longer: int
) -> Told:
    """A token that takes 1 to 9 at each place, more where it is told, on clocks that are off."""
    names = TOOK.split()
    took = dict(zip(names, (1, 5, 2, 1, 1, 3, 4, 2, 3, 2, 1, 0, 1), strict=True)) | longer
    shard, orchestrator, tokenizer = clocks
    departed = start + took["schedule"] + took["forward"] + took["sample"] + took["engine"]
    sent = departed + took["outbox"]
    arrived = sent + took["shard_hop"]
    visible = arrived + took["commit"]
    relayed = visible + took["relay"]
    received = relayed + took["hop"]
    began = received + took["queue"] + took["write"]
    filled = began + took["detokenize"]
    step = StepMoments(
        "other" if other_shard else "one",
        1,
        start + shard,
        took["schedule"],
        took["forward"],
        took["sample"],
        departed + shard,
        sent + shard,
        arrived + orchestrator,
    )
    moments = TokenMoments(step, clock, visible + orchestrator, relayed + orchestrator, received + tokenizer)
    return Told(
        moments, Delivery(began + tokenizer, filled + tokenizer, filled + took["after"] + tokenizer, took["write"])
    )


TOOK = "schedule forward sample engine outbox shard_hop commit relay hop queue detokenize write after"
"""Where the time of a token passes here."""
CLOCKS = (10**15, -(10**12), 7)


def test_each_delay_is_in_its_own_part() -> None:
    begun = walk(1000, clocks=CLOCKS)
    undisturbed = between(begun, walk(1100, clocks=CLOCKS))
    assert undisturbed == Parts(interval=100, wait=91, schedule=1, forward=5, sample=2, publish=1)
    for name in ("shard_hop", "commit", "relay", "hop", "queue", "detokenize", "write"):
        parts = between(begun, walk(1100, clocks=CLOCKS, **{name: 1000 + {"shard_hop": 3, "commit": 4}.get(name, 0)}))
        assert getattr(parts, name) >= 990
        rest = parts._replace(**{name: 0, "interval": 0})
        assert rest == undisturbed._replace(interval=0)
    assert between(begun, walk(1100, clocks=CLOCKS, outbox=501)).publish == 501
    assert between(begun, walk(1600, clocks=CLOCKS)).wait == 591


def test_a_takeover_is_unaccounted_and_what_is_known_is_told() -> None:
    begun = walk(1000, clocks=CLOCKS)
    other_shard = between(begun, walk(5000, clocks=(0, CLOCKS[1], CLOCKS[2]), other_shard=1))
    assert (other_shard.interval, other_shard.unaccounted) == (4000, 4000)
    other_orchestrator = between(begun, walk(5000, clocks=(0, 0, CLOCKS[2]), other_shard=1, clock=2, queue=12))
    assert (other_orchestrator.queue, other_orchestrator.unaccounted) == (10, 4000)
