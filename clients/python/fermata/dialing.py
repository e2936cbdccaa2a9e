"""How a connection is made, told alive and shared: what the sync and the async links have in common.

Knows gRPC's options, the standard health protocol and who holds which link; opens and closes nothing by itself.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import grpc

from fermata.errors import Unavailable
from fermata.resume import DIAL_TIMEOUT, Endpoint

DEFAULT_SERVER = "127.0.0.1:7433"
SCHEME = "grpc://"

CLOSED = "the client was closed"
NO_ANSWER = "the timeout passed while no server answered"

PARALLEL_DIALS = 2
"""Behind a port that several processes share one of two connections may hang (R18)."""

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    # Every channel has a connection of its own, so that a new channel is a new dial.
    ("grpc.use_local_subchannel_pool", 1),
    # Without ping_timeout a stopped peer is never noticed; without keepalive ping_timeout does nothing.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
    # The minimum is also the time that one connection attempt has, until the peer's HTTP/2 settings have come.
    ("grpc.min_reconnect_backoff_ms", int(DIAL_TIMEOUT * 1000)),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Retries are decided in resume.py, which knows what may be repeated.
    ("grpc.enable_retries", 0),
]

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
"""The dial that counts: an answer shows that the process's event loop turns, which a bare connection does not."""

HEALTH_REQUEST = b""
"""`grpc.health.v1.HealthCheckRequest` for the whole server."""

_NOT_SERVING = b"\x08\x02"  # HealthCheckResponse{status: NOT_SERVING}
_ANSWERS = (
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)


class Health(enum.Enum):
    """What a dial found."""

    SERVING = enum.auto()
    NOT_SERVING = enum.auto()
    SILENT = enum.auto()


def health_of(response: bytes) -> Health:
    """What a health response says."""
    return Health.NOT_SERVING if response.startswith(_NOT_SERVING) else Health.SERVING


def health_after(code: grpc.StatusCode) -> Health:
    """What a failed check says: a server that refuses the call is alive."""
    return Health.SERVING if code in _ANSWERS else Health.SILENT


def unreachable(addresses: list[str], *, answered: bool) -> Unavailable:
    """The error of a race that nobody won."""
    names = ", ".join(dict.fromkeys(addresses))
    return Unavailable(
        f"the server at {names} is not ready" if answered else f"no server answers at {names}", reason=""
    )


def parse_server(server: str) -> str:
    """HOST:PORT of what `fermata-server up` prints as `grpc://HOST:PORT`, or of HOST:PORT itself.

    Raises:
        ValueError: it has no port.
    """
    address = server.removeprefix(SCHEME).rstrip("/")
    if address.startswith("unix:"):
        return address
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"a server is HOST:PORT, not {server!r}")
    return address


AnyLink = TypeVar("AnyLink")


class LinkTable(Generic[AnyLink]):
    """Which links there are and how many calls and streams hold each. Any thread may call.

    A link that nobody holds is to be closed, but for the current one to the client's own address.
    """

    def __init__(self, home: str, make: Callable[[Endpoint], AnyLink]) -> None:
        self.home = Endpoint(home, 0)
        self._make = make
        self._current: dict[Endpoint, AnyLink] = {}
        self._holders: dict[AnyLink, int] = {}
        self._closed = False
        self._lock = threading.Lock()

    def hold(self, endpoint: Endpoint) -> AnyLink:
        """The current link to a place, made when there is none.

        Raises:
            RuntimeError: the client was closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError(CLOSED)
            link = self._current.get(endpoint)
            if link is None:
                link = self._current[endpoint] = self._make(endpoint)
            self._holders[link] = self._holders.get(link, 0) + 1
            return link

    def release(self, link: AnyLink) -> bool:
        """Gives a held link back; True when it is to be closed now."""
        with self._lock:
            holders = self._holders.get(link)
            if holders is None:
                return False  # everything was closed before
            self._holders[link] = holders - 1
            if holders > 1 or self._current.get(self.home) is link:
                return False
            del self._holders[link]
            self._forget(link)
            return True

    def discard(self, link: AnyLink) -> None:
        """Nobody shall get this link any more; who holds it may go on."""
        with self._lock:
            self._forget(link)

    def clear(self) -> list[AnyLink]:
        """Forgets all links and returns them, to be closed; there are no new ones."""
        with self._lock:
            self._closed = True
            links = list(self._holders)
            self._holders.clear()
            self._current.clear()
            return links

    def _forget(self, link: AnyLink) -> None:
        for endpoint, current in list(self._current.items()):
            if current is link:
                del self._current[endpoint]
