"""BlockPool: the books balance, prefixes are found by those who may find them, the least recently used go first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.shard.blocks import BlockPool, OutOfBlocks

SIZE = 4


def keys_of(pool: BlockPool, token_ids: list[int], tenant: str = "default") -> list[bytes]:
    keys: list[bytes] = []
    pool.extend_keys(keys, tenant, token_ids)
    return keys


def cache(pool: BlockPool, token_ids: list[int], tenant: str = "default") -> list[int]:
    """Lets a sequence compute its full blocks and go; returns them."""
    keys = keys_of(pool, token_ids, tenant)
    table = pool.take(len(keys))
    table = [pool.publish(key, block) for key, block in zip(keys, table, strict=True)]
    pool.release(table)
    return table


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="a pool needs blocks"):
        BlockPool(0, SIZE)


def test_blocks_for_rounds_up() -> None:
    pool = BlockPool(4, SIZE)
    assert [pool.blocks_for(count) for count in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_taking_more_than_there_is_takes_nothing() -> None:
    pool = BlockPool(4, SIZE)
    held = pool.take(3)
    with pytest.raises(OutOfBlocks, match="2 blocks wanted, 1 available"):
        pool.take(2)
    assert pool.available == 1
    pool.check_integrity([held])


def test_a_released_prefix_is_found_again() -> None:
    pool = BlockPool(8, SIZE)
    table = cache(pool, list(range(8)))
    assert pool.available == 8
    assert pool.match(keys_of(pool, [*range(8), 100, 101]), 2) == table
    assert pool.available == 6
    pool.check_integrity([table])


def test_a_match_ends_at_the_first_difference_and_at_the_most_wanted() -> None:
    pool = BlockPool(8, SIZE)
    table = cache(pool, list(range(12)))
    assert pool.match(keys_of(pool, [*range(4), 99, *range(5, 12)]), 3) == table[:1]
    assert pool.match(keys_of(pool, list(range(12))), 2) == table[:2]
    # Equal ids behind another beginning are another prefix.
    assert pool.match(keys_of(pool, [99, *range(1, 12)]), 3) == []


def test_only_full_blocks_have_keys() -> None:
    pool = BlockPool(8, SIZE)
    assert [len(keys_of(pool, list(range(count)))) for count in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_keys_grow_as_they_would_be_made_at_once() -> None:
    pool = BlockPool(8, SIZE)
    keys = keys_of(pool, list(range(5)))
    pool.extend_keys(keys, "default", list(range(13)))
    assert keys == keys_of(pool, list(range(13)))


def test_tenants_and_processes_have_different_keys() -> None:
    pool, other = BlockPool(8, SIZE), BlockPool(8, SIZE)
    ids = list(range(8))
    cache(pool, ids, tenant="a")
    assert pool.match(keys_of(pool, ids, tenant="b"), 2) == []
    assert not set(keys_of(pool, ids)) & set(keys_of(other, ids))
    assert keys_of(BlockPool(8, SIZE, secret=b"s"), ids) == keys_of(BlockPool(8, SIZE, secret=b"s"), ids)


def test_without_the_prefix_cache_nothing_is_found() -> None:
    pool = BlockPool(8, SIZE, prefix_cache=False)
    cache(pool, list(range(8)))
    assert pool.match(keys_of(pool, list(range(8))), 2) == []
    pool.check_integrity([])


def test_the_least_recently_released_prefix_is_given_away_first() -> None:
    pool = BlockPool(4, SIZE)
    old, young = list(range(8)), list(range(50, 58))
    cache(pool, old)
    cache(pool, young)
    pool.release(pool.match(keys_of(pool, old), 2))  # used again, so `young` is the older one now
    held = pool.take(2)
    found = pool.match(keys_of(pool, old), 2)
    assert len(found) == 2
    assert pool.match(keys_of(pool, young), 2) == []
    pool.check_integrity([held, found])


def test_a_chain_is_lost_from_its_end() -> None:
    pool = BlockPool(4, SIZE)
    table = cache(pool, list(range(16)))
    pool.take(1)
    assert pool.match(keys_of(pool, list(range(16))), 4) == table[:3]


def test_free_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(4, SIZE)
    table = cache(pool, list(range(8)))
    assert not set(pool.take(2)) & set(table)
    assert len(pool.match(keys_of(pool, list(range(8))), 2)) == 2


def test_equal_blocks_become_one() -> None:
    pool = BlockPool(8, SIZE)
    key = keys_of(pool, list(range(4)))[0]
    first, second = pool.take(2)
    assert pool.publish(key, first) == first
    assert pool.publish(key, second) == first
    pool.check_integrity([[first], [first]])
    assert pool.available == 7


def test_a_forgotten_block_is_not_found_and_still_held() -> None:
    pool = BlockPool(8, SIZE)
    keys = keys_of(pool, list(range(8)))
    table = [pool.publish(key, block) for key, block in zip(keys, pool.take(2), strict=True)]
    pool.forget(table[:1])
    assert pool.match(keys, 2) == []
    pool.check_integrity([table])
    pool.release(table)
    pool.forget(table)
    pool.check_integrity([])
    assert pool.available == 8


def test_a_fork_shares_full_blocks_and_copies_the_last_one_before_writing() -> None:
    pool = BlockPool(8, SIZE)
    leader = pool.take(3)
    sibling = pool.fork(leader, 6)
    assert sibling == leader[:2]
    assert pool.is_shared(leader[1]) and not pool.is_shared(leader[2])
    copy = pool.own_last(sibling)
    assert copy == (leader[1], sibling[1])
    assert sibling[0] == leader[0] and sibling[1] not in leader
    pool.check_integrity([leader, sibling])


def test_the_last_holder_of_a_forked_block_writes_into_it() -> None:
    pool = BlockPool(8, SIZE)
    keys = keys_of(pool, list(range(8)))
    leader = [pool.publish(key, block) for key, block in zip(keys, pool.take(2), strict=True)]
    sibling = pool.fork(leader, 6)
    pool.release(leader)
    assert pool.own_last(sibling) is None
    # Its content is about to change, so it must not be found under its old key.
    assert pool.match(keys, 2) == sibling[:1]


def test_the_books_are_really_counted() -> None:
    pool = BlockPool(4, SIZE)
    held = pool.take(2)
    with pytest.raises(AssertionError, match="1 references, 0 holders"):
        pool.check_integrity([held[:1]])
    with pytest.raises(AssertionError, match="1 references, 2 holders"):
        pool.check_integrity([held, held[:1]])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_order_of_uses_keeps_the_books(data: st.DataObject) -> None:
    pool = BlockPool(data.draw(st.integers(1, 6)), 2, prefix_cache=data.draw(st.booleans()))
    tables: list[list[int]] = []
    for _ in range(data.draw(st.integers(0, 25))):
        action = data.draw(st.sampled_from(["sequence", "fork", "release", "forget"]))
        if action == "sequence":
            token_ids = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=8))
            keys = keys_of(pool, token_ids)
            table = pool.match(keys, len(keys))
            missing = pool.blocks_for(len(token_ids)) - len(table)
            if missing > pool.available:
                pool.release(table)
            else:
                table += pool.take(missing)
                tables.append([pool.publish(key, block) for key, block in zip(keys, table, strict=False)])
                tables[-1] += table[len(keys) :]
        elif action == "forget" and tables:
            pool.forget(data.draw(st.sampled_from(tables)))
        elif action == "release" and tables:
            pool.release(tables.pop(data.draw(st.integers(0, len(tables) - 1))))
        elif action == "fork" and tables:
            leader = data.draw(st.sampled_from(tables))
            sibling = pool.fork(leader, data.draw(st.integers(1, 2 * len(leader))))
            if pool.available or not pool.is_shared(sibling[-1]):
                pool.own_last(sibling)
            tables.append(sibling)
        pool.check_integrity(tables)
    for table in tables:
        pool.release(table)
    pool.check_integrity([])
    assert pool.available == pool.block_count
