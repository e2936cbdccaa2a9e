"""Who is there: the addresses of a service's replicas.

One small protocol, so that services know neither Ray nor the supervisor. `StaticDirectory` is a fixed list: a plain
process that is restarted listens where it did before, so the list stays true.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol


class Directory(Protocol):
    """The replicas of one service, as far as is known now."""

    def addresses(self) -> Sequence[str]:
        """HOST:PORT of each replica; they may be down."""
        ...


class StaticDirectory:
    """A list that does not change."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = tuple(addresses)

    def addresses(self) -> Sequence[str]:
        """The list."""
        return self._addresses


def by_preference(addresses: Sequence[str], key: str) -> list[str]:
    """Orders addresses by rendezvous hashing: everybody asks the same replica first for the same key."""
    return sorted(addresses, key=lambda address: hashlib.sha256(f"{key}\0{address}".encode()).digest())
