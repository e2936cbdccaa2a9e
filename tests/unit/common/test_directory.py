"""Who is there."""

from __future__ import annotations

from services.common.directory import PublishedDirectory, StaticDirectory, by_preference, publish


def test_what_is_published_is_seen_by_all_directories_of_the_name() -> None:
    one, other, unrelated = PublishedDirectory("X"), PublishedDirectory("X"), PublishedDirectory("Y")
    assert one.addresses() == []
    publish("X", [{"address": "b:2", "pid": 2}, {"address": "a:1", "pid": 1}])
    assert one.addresses() == other.addresses() == ["a:1", "b:2"]
    assert [item["pid"] for item in one.replicas()] == [1, 2]
    assert unrelated.addresses() == []
    publish("X", [])
    assert one.addresses() == []


def test_everybody_prefers_the_same_and_the_loss_of_one_moves_nobody_else() -> None:
    addresses = [f"host:{port}" for port in range(8)]
    orders = {key: by_preference(addresses, key) for key in map(str, range(200))}
    assert by_preference(list(reversed(addresses)), "7") == orders["7"]
    assert len({order[0] for order in orders.values()}) == len(addresses)
    left = addresses[1:]
    for key, order in orders.items():
        assert by_preference(left, key) == [address for address in order if address != addresses[0]]
    assert StaticDirectory(addresses).addresses() == tuple(addresses)
