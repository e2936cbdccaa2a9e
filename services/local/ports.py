"""Ports that stay ours before a process listens on them and between its restarts.

A socket that is bound with SO_REUSEADDR and never listens keeps its port out of the kernel's choice of free ones, for
servers and for outgoing connections alike, while a process that sets SO_REUSEADDR, as every gRPC server does, can
listen on it. So all addresses are known before anything has started, and a restarted process gets its own port back.
Connections meanwhile are refused at once, as if nobody were there. Linux semantics; knows nothing of services.
"""

from __future__ import annotations

import errno
import socket
import sys
from types import TracebackType

from services.local.errors import PortTaken


class HeldPort:
    """A port that is kept for others to listen on; a context manager.

    Attributes:
        host: the IPv4 address or name it was asked for.
        number: the port.
    """

    def __init__(self, host: str, number: int = 0) -> None:
        """Takes the port, or a free one for 0.

        Raises:
            PortTaken: somebody listens there, or the host or port is not ours to use.
        """
        self.host = host
        self._sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM)]
        holder = self._sockets[0]
        try:
            # Without SO_REUSEADDR connections of an earlier run that are in TIME_WAIT would refuse us for a minute.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((host, number))
            self.number: int = holder.getsockname()[1]
            self._exclude_others()
        except OSError as error:
            self.close()
            taken = error.errno == errno.EADDRINUSE
            reason = "another process listens there" if taken else (error.strerror or str(error))
            raise PortTaken(f"cannot use {host}:{number}: {reason}") from error
        except OverflowError as error:
            self.close()
            raise PortTaken(f"cannot use {host}:{number}: ports are 0 to 65535") from error

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"{self.host}:{self.number}"

    def close(self) -> None:
        """Gives the port back."""
        for item in self._sockets:
            item.close()

    def __enter__(self) -> HeldPort:
        """Holds the port."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the port back."""
        self.close()

    def _exclude_others(self) -> None:
        """Keeps a second holder away, whom SO_REUSEADDR would let bind as long as nobody listens.

        An abstract Unix socket lives in the network namespace, as ports do, and vanishes with its process.
        """
        if sys.platform != "linux":
            return
        guard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sockets.append(guard)
        guard.bind(f"\0fermata-port-{self.host}:{self.number}")
