"""Who is there: the addresses of a service's replicas.

One small protocol, so that services know neither Ray nor the supervisor. `StaticDirectory` is a fixed list: a plain
process that is restarted listens where it did before, so the list stays true. `PublishedDirectory` is what somebody who
knows tells this process, again and again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


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


_published: dict[str, tuple[Mapping[str, Any], ...]] = {}


def publish(name: str, replicas: Sequence[Mapping[str, Any]]) -> None:
    """Tells this process who the replicas of a deployment are; safe on any thread.

    Args:
        name: of the deployment.
        replicas: what each says of itself; `address` is HOST:PORT.
    """
    _published[name] = tuple(sorted(replicas, key=lambda item: str(item["address"])))


class PublishedDirectory:
    """What was published last in this process."""

    def __init__(self, name: str) -> None:
        self._name = name

    def replicas(self) -> Sequence[Mapping[str, Any]]:
        """What they say of themselves."""
        return _published.get(self._name, ())

    def addresses(self) -> Sequence[str]:
        """HOST:PORT of each."""
        return [str(item["address"]) for item in self.replicas()]


def by_preference(addresses: Sequence[str], key: str) -> list[str]:
    """Orders addresses by rendezvous hashing: everybody asks the same replica first for the same key."""
    return sorted(addresses, key=lambda address: hashlib.sha256(f"{key}\0{address}".encode()).digest())
