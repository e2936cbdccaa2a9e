"""Which shard runs a session."""

from __future__ import annotations

from services.common.types import Fingerprint
from services.orchestrator.placement import ShardView, choose_shard

SAME, OTHER = Fingerprint(weights="a"), Fingerprint(weights="b")


def pick(
    shards: list[ShardView], *, session: str = "s", fingerprint: Fingerprint | None = None, exact: bool = False
) -> str:
    chosen = choose_shard(shards, session=session, fingerprint=fingerprint, exact=exact)
    return chosen.address if chosen else ""


def test_a_session_always_prefers_the_same_shard_and_sessions_spread() -> None:
    shards = [ShardView(f"host:{port}", SAME) for port in range(4)]
    chosen = [pick(shards, session=str(number)) for number in range(200)]
    assert chosen == [pick(shards[::-1], session=str(number)) for number in range(200)]
    assert min(chosen.count(shard.address) for shard in shards) > 20


def test_an_equal_fingerprint_comes_before_room() -> None:
    shards = [ShardView("a:1", OTHER), ShardView("b:1", SAME, waiting=5)]
    assert {pick(shards, session=str(number), fingerprint=SAME) for number in range(20)} == {"b:1"}


def test_a_shard_with_room_comes_before_the_preferred_one() -> None:
    shards = [ShardView("a:1", SAME, waiting=1), ShardView("b:1", SAME, running=64), ShardView("c:1", SAME)]
    assert {pick(shards, session=str(number)) for number in range(20)} == {"c:1"}


def test_exact_takes_nothing_else() -> None:
    assert pick([ShardView("a:1", OTHER)], fingerprint=SAME, exact=True) == ""
    assert pick([ShardView("a:1", OTHER)], fingerprint=SAME) == "a:1"
    assert pick([ShardView("a:1", OTHER)], exact=True) == "a:1"


def test_nobody_goes_to_a_shard_that_leaves() -> None:
    assert pick([ShardView("a:1", SAME, draining=True)]) == ""
    assert pick([]) == ""
