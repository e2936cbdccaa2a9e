"""The life of a service in its process: the ready line, signals, and the stop with grace.

A service binds its server and hands it to `run`, together with the host that it lives in: a process of its own
(`SignalHost`), or whatever else can say when it shall stop. Knows no service and no setting; failpoints and
configuration stay with the caller.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from grpc import aio

log = logging.getLogger(__name__)

STOP_GRACE = 10.0
"""Seconds from the first signal until calls that still run are cancelled."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What a service tells its host once it serves.

    Attributes:
        ports: that it listens on; the last is its own alone.
        load: how busy it is now, by name; cheap, safe on any thread.
    """

    ports: tuple[int, ...]
    load: Callable[[], Mapping[str, float]]


class Host(Protocol):
    """What a service lives in."""

    def ready(self, serving: Serving) -> None:
        """The service serves from now on."""
        ...

    async def stopping(self) -> None:
        """Returns when the service shall stop."""
        ...


class SignalHost:
    """A process of its own, which SIGTERM or SIGINT ends.

    Further signals change nothing: a terminal and a supervisor both send theirs when the user presses Ctrl-C once.
    """

    def __init__(self, ready_fd: int) -> None:
        """Handles the signals from now on; needs a running event loop. `ready_fd`: see `announce`."""
        self._ready_fd = ready_fd
        self._stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)

    def ready(self, serving: Serving) -> None:
        """Tells whoever started the process."""
        announce(serving.ports, self._ready_fd)

    async def stopping(self) -> None:
        """Waits for a signal."""
        await self._stop.wait()


def announce(ports: tuple[int, ...], ready_fd: int) -> None:
    """Tells whoever started the process that it serves: the ports as a line, then the descriptor is closed.

    Args:
        ports: the bound ports.
        ready_fd: an inherited descriptor, usually a pipe; negative tells nobody.

    Raises:
        OSError: the descriptor is not open, or its reader is gone.
    """
    if ready_fd < 0:
        return
    with os.fdopen(ready_fd, "w") as pipe:
        pipe.write(f"{' '.join(map(str, ports))}\n")


async def run(
    server: aio.Server,
    serving: Serving,
    host: Host,
    *,
    on_stop: Callable[[], Awaitable[None]] | None = None,
    grace: float = STOP_GRACE,
) -> None:
    """Starts a bound server, tells its host, serves until the host says stop, then stops with grace.

    Args:
        server: bound, with its services added, not yet started.
        serving: what the host is told.
        host: what the service lives in.
        on_stop: drains (R19): tells peers to leave and waits until they did. It is cut off when `grace` is over.
        grace: seconds for `on_stop` and for the calls that still run after it, together.
    """
    loop = asyncio.get_running_loop()
    await server.start()
    host.ready(serving)
    log.info("serving on port %s", " ".join(map(str, serving.ports)))
    await host.stopping()
    log.info("stopping")
    deadline = loop.time() + grace
    if on_stop is not None:
        try:
            async with asyncio.timeout_at(deadline):
                await on_stop()
        except TimeoutError:
            log.warning("not everybody left within %.0f s", grace)
    await server.stop(max(0.0, deadline - loop.time()))
    log.info("stopped")
