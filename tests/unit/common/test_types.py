"""Packed ids, preferences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fermata.running_hash import EMPTY_HASH, extend_hash, hash_ids
from services.common.directory import StaticDirectory, by_preference
from services.common.types import pack_ids, unpack_ids


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_ids_come_back(token_ids: list[int]) -> None:
    assert unpack_ids(pack_ids(token_ids)) == token_ids


def test_ids_are_little_endian_u32() -> None:
    assert pack_ids([1, 0x01020304]) == b"\x01\0\0\0\x04\x03\x02\x01"


def test_what_is_no_packed_list_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes"):
        unpack_ids(b"\x01\0\0")
    with pytest.raises(OverflowError):
        pack_ids([2**32])


def test_running_hash_known_answer() -> None:
    # SHA-256 of eight zero bytes and 01 00 00 00, its first eight bytes.
    assert extend_hash(EMPTY_HASH, 1).hex() == "c3e42245ffdff31c"
    assert hash_ids([1, 2], EMPTY_HASH) == extend_hash(extend_hash(EMPTY_HASH, 1), 2)


def test_everybody_asks_the_same_replica_first() -> None:
    addresses = StaticDirectory(["a:1", "b:1", "c:1"]).addresses()
    assert by_preference(addresses, "key") == by_preference(addresses[::-1], "key")
    firsts = {by_preference(addresses, str(number))[0] for number in range(50)}
    assert firsts == set(addresses)
