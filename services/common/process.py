"""The life of a service's process: logging, the ready line, signals, and the stop with grace.

Every `__main__` binds its server and hands it to `run`. Knows no service and no setting; failpoints and configuration
stay with the caller.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

from grpc import aio

log = logging.getLogger(__name__)

STOP_GRACE = 10.0
"""Seconds from the first signal until calls that still run are cancelled."""


def configure_logging(service: str) -> None:
    """Sends the log to standard error, one line per event, with the service's name and process id."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"%(asctime)s.%(msecs)03d %(levelname).1s {service}[{os.getpid()}] %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )


def announce(port: int | tuple[int, ...], ready_fd: int) -> None:
    """Tells whoever started the process that it serves: the port as a line, then the descriptor is closed.

    Args:
        port: the bound port; several are told on one line.
        ready_fd: an inherited descriptor, usually a pipe; negative tells nobody.

    Raises:
        OSError: the descriptor is not open, or its reader is gone.
    """
    if ready_fd < 0:
        return
    with os.fdopen(ready_fd, "w") as pipe:
        pipe.write(f"{_ports(port)}\n")


def _ports(port: int | tuple[int, ...]) -> str:
    return " ".join(map(str, port if isinstance(port, tuple) else (port,)))


async def run(
    server: aio.Server,
    port: int | tuple[int, ...],
    ready_fd: int,
    *,
    on_stop: Callable[[], Awaitable[None]] | None = None,
    grace: float = STOP_GRACE,
) -> None:
    """Starts a bound server, announces it, serves until SIGTERM or SIGINT, then stops with grace.

    Further signals change nothing: a terminal and a supervisor both send theirs when the user presses Ctrl-C once.

    Args:
        server: bound, with its services added, not yet started.
        port: the bound port or ports, for the ready line.
        ready_fd: see `announce`.
        on_stop: drains (R19): tells peers to leave and waits until they did. It is cut off when `grace` is over.
        grace: seconds for `on_stop` and for the calls that still run after it, together.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    announce(port, ready_fd)
    log.info("serving on port %s", _ports(port))
    await stop.wait()
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
