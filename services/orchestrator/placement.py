"""Which shard runs a sequence. Pure: takes what is known of the shards and returns an address.

Knows neither links nor sequences; the caller says what it knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from services.common.types import Fingerprint


@dataclass(frozen=True, slots=True)
class ShardView:
    """What an orchestrator knows of a shard that answers.

    Attributes:
        address: HOST:PORT.
        fingerprint: what it serves (R20).
        waiting: sequences that have no KV blocks yet.
        running: sequences that have.
        capacity: most sequences in a step.
        draining: it is about to leave.
    """

    address: str
    fingerprint: Fingerprint
    waiting: int = 0
    running: int = 0
    capacity: int = 64
    draining: bool = False


def choose_shard(
    shards: Iterable[ShardView], *, session: str, fingerprint: Fingerprint | None, exact: bool
) -> ShardView | None:
    """Picks a shard for a session.

    An equal fingerprint comes first (R20), then a shard with room, then the one that the session's key prefers among
    all (rendezvous hashing), so that the next turn finds its prefix in the same cache.

    Args:
        shards: those that answer.
        session: key of the session.
        fingerprint: what the generation began on; None when it begins.
        exact: only an equal fingerprint will do.

    Returns:
        The shard, or None when there is none that will do.
    """

    def rank(shard: ShardView) -> tuple[bool, bool, bytes]:
        differs = fingerprint is not None and shard.fingerprint != fingerprint
        full = shard.waiting > 0 or shard.running >= shard.capacity
        return differs, full, hashlib.sha256(f"{session}\0{shard.address}".encode()).digest()

    candidates = [
        shard
        for shard in shards
        if not shard.draining and (not exact or fingerprint is None or shard.fingerprint == fingerprint)
    ]
    return min(candidates, key=rank, default=None)
