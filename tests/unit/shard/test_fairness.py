"""FairQueue: priority, then the tenant that was served least, then arrival."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from services.shard.fairness import FairQueue
from services.shard.sequence import Sequence
from tests.unit.shard.fakes import admission

_arrivals = itertools.count(1)


def sequence(tenant: str = "a", priority: int = 0) -> Sequence:
    asked = admission([1], tenant=tenant, priority=priority)
    return Sequence(asked, next(_arrivals), asked.grant, None)


def serve(queue: FairQueue, cost: int = 10) -> Sequence:
    """Serves whose turn it is, who is then done."""
    served = next(queue.turns())
    queue.charge(served, cost)
    queue.remove(served)
    return served


def fill(queue: FairQueue, tenants: Iterable[str], priority: int = 0) -> list[Sequence]:
    added = [sequence(tenant, priority) for tenant in tenants]
    for each in added:
        queue.add(each)
    return added


def tenants_of(served: list[Sequence]) -> str:
    return "".join(each.admission.tenant for each in served)


def test_one_tenant_is_served_in_the_order_of_arrival() -> None:
    queue, added = FairQueue(), [sequence() for _ in range(3)]
    for each in reversed(added):
        queue.add(each)
    assert list(queue.turns()) == added
    assert [serve(queue) for _ in range(3)] == added
    assert len(queue) == 0 and list(queue.turns()) == []


def test_tenants_take_turns_whoever_came_first() -> None:
    queue = FairQueue()
    fill(queue, "aaaaabb")
    assert tenants_of([serve(queue) for _ in range(7)]) == "ababaaa"


def test_what_counts_is_what_was_computed() -> None:
    queue = FairQueue()
    fill(queue, "aaabbbbbb")
    served = []
    for _ in range(6):
        served.append(next(queue.turns()))
        queue.charge(served[-1], 30 if served[-1].admission.tenant == "a" else 10)
        queue.remove(served[-1])
    assert tenants_of(served) == "abbbab"


def test_charges_of_those_who_run_count() -> None:
    queue, running = FairQueue(), sequence("a")
    fill(queue, "ab")
    queue.charge(running, 1)
    assert serve(queue).admission.tenant == "b"


def test_charges_within_a_round_of_turns_count() -> None:
    queue = FairQueue()
    fill(queue, "aaabc")
    order = []
    for each in queue.turns():
        order.append(each)
        queue.charge(each, 1 if each.admission.tenant == "b" else 10)
    assert tenants_of(order) == "abcaa"


def test_who_was_away_has_saved_nothing() -> None:
    queue = FairQueue()
    fill(queue, "a" * 20)
    for _ in range(10):
        serve(queue)
    fill(queue, "b" * 10)
    assert tenants_of([serve(queue) for _ in range(6)]) == "ababab"


def test_who_comes_back_owes_what_he_had_more_than_others() -> None:
    queue = FairQueue()
    fill(queue, "abbbb")
    assert serve(queue, 25).admission.tenant == "a"
    fill(queue, "a")
    assert tenants_of([serve(queue) for _ in range(4)]) == "bbba"


def test_where_nobody_waits_nothing_is_owed() -> None:
    queue = FairQueue()
    fill(queue, "a")
    serve(queue, 1000)
    fill(queue, "ab")
    assert tenants_of([serve(queue), serve(queue)]) == "ab"


def test_priority_comes_first_and_priorities_owe_each_other_nothing() -> None:
    queue = FairQueue()
    fill(queue, "ab", priority=-1)
    fill(queue, "aaa", priority=1)
    fill(queue, "ba", priority=-1)
    assert tenants_of([serve(queue) for _ in range(7)]) == "aaaabba"


def test_tenants_that_are_gone_are_forgotten() -> None:
    queue = FairQueue()
    fill(queue, "aa")  # somebody waits all the time
    for number in range(1000):
        (gone,) = fill(queue, [f"tenant {number}"])
        queue.charge(gone, 1)
        queue.remove(gone)
        queue.charge(next(iter(queue)), 1)
    (level,) = queue._levels.values()
    assert len(level._counters) < 200


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(0, 20))
def test_two_tenants_that_wait_are_served_alike(costs: list[int], head_start: int) -> None:
    """What they were served since both wait never differs by more than one turn costs."""
    queue, served = FairQueue(), {"a": 0, "b": 0}
    fill(queue, "a" * (len(costs) + 20))
    for _ in range(head_start):
        serve(queue)
    fill(queue, "b" * (len(costs) + 1))
    for cost in costs:
        tenant = serve(queue, cost).admission.tenant
        served[tenant] += cost
        assert abs(served["a"] - served["b"]) <= 50
