"""Failpoints and planted bugs by name, for tests that must hit one exact moment.

`FERMATA_FAILPOINTS=name:action@count[,…]` arms a failpoint: at its `count`-th passing (1 if left out) the
process does `action`: `kill` (SIGKILL to itself), `stop` (SIGSTOP), `raise` (`FailpointError`), `sleep=SECONDS`
(blocks the calling thread). `FERMATA_PLANT=name[,…]` turns on deliberate bugs that the checker must catch.
Both are read only when the configuration says `testing`. Knows nothing of what the names stand for.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable, Mapping

ACTIONS = ("kill", "stop", "raise", "sleep")


class FailpointError(RuntimeError):
    """Raised where a failpoint is armed with `raise`."""


class _Armed:
    """One failpoint with what is left of its count."""

    def __init__(self, act: Callable[[], object], count: int) -> None:
        self.act, self.count = act, count


_armed: dict[str, _Armed] = {}
_planted: frozenset[str] = frozenset()


def configure(environment: Mapping[str, str], *, testing: bool) -> None:
    """Reads both variables; without `testing` everything is disarmed.

    Raises:
        ValueError: a variable does not parse.
    """
    global _planted  # noqa: PLW0603
    _armed.clear()
    _planted = frozenset()
    if not testing:
        return
    for entry in filter(None, environment.get("FERMATA_FAILPOINTS", "").split(",")):
        name, separator, rest = entry.partition(":")
        action, _, count = rest.partition("@")
        action, _, argument = action.partition("=")
        if not separator or action not in ACTIONS:
            raise ValueError(f"failpoint {entry!r}: want name:action@count with an action of {', '.join(ACTIONS)}")
        _armed[name] = _Armed(functools.partial(_act, name, action, argument), int(count or 1))
    _planted = frozenset(filter(None, environment.get("FERMATA_PLANT", "").split(",")))


def on(name: str, callback: Callable[[], object], *, count: int = 1) -> None:
    """Arms a failpoint of this process with a callback, for tests that run services in their own process."""
    _armed[name] = _Armed(callback, count)


def planted(name: str) -> bool:
    """Whether the planted bug `name` is on."""
    return name in _planted


def hit(name: str) -> None:
    """Marks that the code passes the point `name`; costs one dictionary look-up when nothing is armed.

    Raises:
        FailpointError: the point is armed with `raise` and its count is reached.
    """
    if not _armed or (point := _armed.get(name)) is None:
        return
    point.count -= 1
    if point.count == 0:
        point.act()


def _act(name: str, action: str, argument: str) -> None:
    if action == "raise":
        raise FailpointError(name)
    if action == "sleep":
        time.sleep(float(argument or "1"))
    else:
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
