"""Residents: who gets blocks, who shares them, and who loses them first."""

from __future__ import annotations

import itertools

import pytest

from services.shard.blocks import BlockPool
from services.shard.residents import Residents
from services.shard.sequence import Sequence
from tests.unit.shard.fakes import SIZE, admission, prompt

_arrivals = itertools.count(1)


class House:
    """Residents with their pool, and those that have lost their blocks."""

    def __init__(self, blocks: int = 8) -> None:
        self.pool = BlockPool(blocks, SIZE)
        self.preempted: list[Sequence] = []
        self.residents = Residents(self.pool, self.preempted.append)

    def come(
        self, length: int, *, first: int = 0, priority: int = 0, grant: int = 8, leader: Sequence | None = None
    ) -> Sequence:
        asked = admission(prompt(length, first), attempt=next(_arrivals), priority=priority, grant=grant)
        return Sequence(asked, asked.attempt, asked.grant, leader)

    def let_in(self, sequence: Sequence, *, room: int = 0, evict: bool = False) -> list[tuple[int, int]] | None:
        copies = self.residents.let_in(sequence, room=room, evict=evict)
        self.residents.check_integrity()
        return copies

    def grow(self, sequence: Sequence, count: int) -> bool:
        """All is computed, and so many tokens are added."""
        self.residents.advance(sequence, sequence.gap)
        sequence.admission.token_ids.extend([1] * count)
        grown = self.residents.grow(sequence)
        self.residents.check_integrity()
        return grown


def test_a_sequence_gets_blocks_for_all_it_knows() -> None:
    house = House()
    sequence = house.come(9)
    assert house.let_in(sequence) == []
    assert (len(sequence.table), sequence.computed, house.pool.available) == (3, 0, 5)


def test_without_room_nothing_changes() -> None:
    house = House(4)
    house.let_in(house.come(5))
    sequence = house.come(8, first=9)
    assert house.let_in(sequence, room=1) is None
    assert sequence.table == [] and house.pool.available == 2
    assert house.let_in(sequence) == []


def test_what_was_computed_is_found_again_and_counted() -> None:
    house = House()
    sequence = house.come(9)
    house.let_in(sequence)
    house.residents.advance(sequence, 9)
    house.residents.leave(sequence)
    again = house.come(9)
    house.let_in(again)
    assert (again.computed, house.residents.cached_tokens) == (8, 8)
    house.residents.distrust(again)
    house.residents.leave(again)
    other = house.come(9)
    house.let_in(other)
    assert other.computed == 0


def test_a_sibling_copies_the_block_that_it_shares_in_part() -> None:
    house = House()
    leader = house.come(6)
    house.let_in(leader)
    house.residents.advance(leader, 6)
    sibling = house.come(6, first=0, leader=leader)
    assert house.let_in(sibling) == [(leader.table[1], sibling.table[1])]
    assert sibling.table[0] == leader.table[0] and sibling.computed == 5


@pytest.mark.parametrize(("priorities", "loser"), [((0, 0, 0), 2), ((0, 0, 1), 1), ((-1, 0, 0), 0)])
def test_the_last_by_rank_loses_its_blocks(priorities: tuple[int, int, int], loser: int) -> None:
    house = House(6)
    sequences = [house.come(7, first=9 * place, priority=priority) for place, priority in enumerate(priorities)]
    for each in sequences:
        house.let_in(each)
    grower = next(place for place in range(3) if place != loser)
    assert house.grow(sequences[grower], 2)
    assert house.preempted == [sequences[loser]]
    assert sequences[loser].table == [] and sequences[loser].computed == 0
    assert house.residents.preemptions == 1


def test_the_last_by_rank_loses_its_own_blocks_when_it_grows() -> None:
    house = House(4)
    first, second = house.come(7), house.come(7, first=9)
    house.let_in(first)
    house.let_in(second)
    assert not house.grow(second, 2)
    assert house.preempted == [second]


def test_those_who_wait_for_a_grant_lose_theirs_first() -> None:
    house = House(4)
    idle, running = house.come(7, grant=0, priority=5), house.come(7, first=9)
    house.let_in(idle)
    house.let_in(running)
    assert house.grow(running, 2)
    assert house.preempted == [idle]


def test_those_who_wait_for_a_grant_make_room_for_a_newcomer_only_when_asked() -> None:
    house = House(4)
    idle, newcomer = house.come(7, grant=0), house.come(9, first=9)
    house.let_in(idle)
    assert house.let_in(newcomer) is None and house.preempted == []
    assert house.let_in(newcomer, evict=True) == [] and house.preempted == [idle]


def test_a_rank_is_kept_for_life() -> None:
    house = House(4)
    first, second = house.come(7), house.come(7, first=9)
    house.let_in(second)
    house.let_in(first)
    assert house.grow(second, 2)
    assert house.preempted == [first] and (second.rank, first.rank) == ((0, 1), (0, 2))
    house.residents.leave(second)
    third = house.come(3, first=20)
    house.let_in(third)
    house.let_in(first)
    assert house.residents.sequences == [first, third], "though it came back later"


def test_the_books_are_really_counted() -> None:
    house = House()
    first, second = house.come(7), house.come(7, first=9)
    house.let_in(first)
    house.let_in(second)
    house.residents.sequences.reverse()
    with pytest.raises(AssertionError, match="order of ranks"):
        house.residents.check_integrity()
    house.residents.sequences.reverse()
    first.computed = 9
    with pytest.raises(AssertionError, match="9 computed"):
        house.residents.check_integrity()
