"""Whose prompt goes on next: higher priority first, and among equals the tenant that has been served least.

Virtual token counters (Sheng et al. 2024, "Fairness in Serving Large Language Models", OSDI): a counter per tenant says
how much was computed for it, and the tenant with the smallest one has the next turn. A tenant that comes back is lifted
to the smallest counter of those that wait already: who was away has saved nothing. Within a tenant the order of arrival
holds, and between equal counters, too.

Priorities do not mix: each has counters of its own, which live as long as anybody waits at that priority. Where nobody
waits nobody is wronged, so that nothing needs to be remembered.

Pure: knows sequences and numbers; nothing of blocks, clocks, or how much a step may compute.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from operator import attrgetter

from services.shard.sequence import Sequence

_KEPT_COUNTERS = 64
"""Counters of tenants that do not wait are looked through when there are more of them than this."""

_arrival = attrgetter("arrival")


class FairQueue:
    """The sequences that have more than one token to compute, or no blocks, and may draw."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in no order."""
        return (each for level in self._levels.values() for queue in level.queues.values() for each in queue)

    def add(self, sequence: Sequence) -> None:
        """Lets a sequence wait for its turns; it is not in the queue."""
        admission = sequence.admission
        level = self._levels.get(admission.priority)
        if level is None:
            level = self._levels[admission.priority] = _Level()
        insort(level.queue_of(admission.tenant), sequence, key=_arrival)
        sequence.queued = True
        self._length += 1

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out that is in the queue."""
        admission = sequence.admission
        queues = self._levels[admission.priority].queues
        queues[admission.tenant].remove(sequence)
        if not queues[admission.tenant]:
            del queues[admission.tenant]
            if not queues:
                del self._levels[admission.priority]
        sequence.queued = False
        self._length -= 1

    def charge(self, sequence: Sequence, cost: int) -> None:
        """Counts what is computed for a sequence, in the queue or not: one for a token, one more if one is drawn."""
        level = self._levels.get(sequence.admission.priority)
        if level is not None:
            level.charge(sequence.admission.tenant, cost)

    def turns(self) -> Iterator[Sequence]:
        """Everybody once, in order. What is charged meanwhile counts; nobody may be added or removed meanwhile."""
        for priority in sorted(self._levels, reverse=True):
            yield from self._levels[priority].turns()


class _Level:
    """The sequences of one priority.

    Attributes:
        queues: those that wait, by tenant, in the order of arrival; none is empty.
    """

    def __init__(self) -> None:
        self.queues: dict[str, list[Sequence]] = {}
        self._counters: dict[str, int] = {}
        self._least = 0
        self._most_counters = _KEPT_COUNTERS

    def queue_of(self, tenant: str) -> list[Sequence]:
        """The queue of a tenant, who is lifted if it was not waiting."""
        queue = self.queues.get(tenant)
        if queue is None:
            self._least = min((self._counters[each] for each in self.queues), default=self._least)
            self._counters[tenant] = max(self._counters.get(tenant, 0), self._least)
            queue = self.queues[tenant] = []
            self._forget()
        return queue

    def charge(self, tenant: str, cost: int) -> None:
        self._counters[tenant] = self._counters.get(tenant, self._least) + cost

    def turns(self) -> Iterator[Sequence]:
        counters = self._counters
        heap = [(counters[tenant], queue[0].arrival, tenant, 0) for tenant, queue in self.queues.items()]
        heapify(heap)
        while heap:
            _, _, tenant, place = heappop(heap)
            queue = self.queues[tenant]
            yield queue[place]
            if place + 1 < len(queue):
                heappush(heap, (counters[tenant], queue[place + 1].arrival, tenant, place + 1))

    def _forget(self) -> None:
        """Drops counters that a tenant would be lifted to anyway."""
        if len(self._counters) > self._most_counters:
            self._counters = {
                tenant: counter
                for tenant, counter in self._counters.items()
                if tenant in self.queues or counter > self._least
            }
            self._most_counters = max(_KEPT_COUNTERS, 2 * len(self._counters))
