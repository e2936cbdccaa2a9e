"""Which orchestrator to ask next. Pure: knows addresses and what happened to them, neither calls nor clocks.

The first is the one that answered before or that rendezvous hashing prefers; after a failure that same one once more
(its process may have come back), then the others in the order of preference, again and again with a pause.
"""

from __future__ import annotations

from services.common.directory import Directory, by_preference

PAUSE = 0.2
"""Seconds to wait when everybody was asked in vain."""


class Route:
    """The way of one caller through the orchestrators.

    Attributes:
        address: to ask now; empty while the directory knows nobody.
    """

    def __init__(self, directory: Directory, key: str, first: str = "") -> None:
        """`key` orders the orchestrators (a session id), `first` is asked before all others."""
        self._directory = directory
        self._key = key
        self._tried: set[str] = set()
        self._may_repeat = False
        self.address = first
        if not first:
            self._choose()

    def succeeded(self) -> None:
        """The address answered as it should."""
        self._tried.clear()
        self._may_repeat = True

    def failed(self, *, leaving: bool = False) -> float:
        """The address broke off or does not answer; chooses the next one.

        Args:
            leaving: it said so itself, so it is not asked again right away.

        Returns:
            Seconds to wait before asking it.
        """
        if self._may_repeat and not leaving and self.address:
            self._may_repeat = False
            return 0.0
        self._may_repeat = False
        self._tried.add(self.address)
        return self._choose()

    def redirected(self, address: str) -> float:
        """The address named another one that should be asked; returns the seconds to wait before."""
        self._tried.add(self.address)
        self._may_repeat = False
        known = address in self._tried
        if known:  # two that point at each other, or at somebody who does not answer us
            self._tried.clear()
        self.address = address
        return PAUSE if known else 0.0

    def _choose(self) -> float:
        addresses = by_preference(self._directory.addresses(), self._key)
        fresh = [address for address in addresses if address not in self._tried]
        if fresh:
            self.address = fresh[0]
            return 0.0
        self._tried.clear()
        self.address = addresses[0] if addresses else ""
        return PAUSE
