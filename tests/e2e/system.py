"""A system as its user starts it: `fermata-server up` with real processes, in a state directory of its own.

Knows the commands and their output; judges nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from services.common.types import DEFAULT_TENANT

BIN = Path(sys.executable).parent
START_SECONDS = 90.0


def server_command(*arguments: str) -> list[str]:
    """`fermata-server` with arguments."""
    return [str(BIN / "fermata-server"), *arguments]


def client(*arguments: str, server: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a `fermata` command to its end."""
    command = [str(BIN / "fermata"), *arguments, "--server", server]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)


def wait_for(condition: Any, seconds: float = 20.0, what: str = "condition") -> Any:
    """Polls until `condition()` is true and returns its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true in {seconds:.0f} s"
        time.sleep(0.05)
    return value


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class UpSystem:
    """A running `fermata-server up`.

    Attributes:
        state: its state directory.
        local: run plain processes instead of Ray Serve.
        address: of the public port.
        process: of `up`.
        ready_seconds: that it took to the ready line.
    """

    def __init__(
        self, state: Path, *arguments: str, local: bool = True, environment: dict[str, str] | None = None
    ) -> None:
        self.state, self.local = state, local
        self._arguments = (*arguments, "--local") if local else arguments
        self._environment = environment or {}
        self.address = ""
        self.ready_seconds = 0.0
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts it and waits for the ready line."""
        began = time.monotonic()
        self.state.parent.mkdir(parents=True, exist_ok=True)
        with (self.state.parent / "up.err").open("a") as errors:
            self.process = subprocess.Popen(
                server_command("up", "--port", "0", "--state-dir", str(self.state), *self._arguments),
                env=os.environ | self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready grpc://"), (line, (self.state.parent / "up.err").read_text())
        self.ready_seconds = time.monotonic() - began
        self.address = line.removeprefix("ready grpc://").strip()

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Sends a signal and returns the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def status(self) -> dict[str, Any]:
        """`fermata-server status --json`."""
        command = server_command("status", "--json", "--state-dir", str(self.state))
        description: dict[str, Any] = json.loads(
            subprocess.run(command, capture_output=True, text=True, check=False).stdout
        )
        return description

    def pids(self) -> list[int]:
        """Of all processes that `up` started."""
        replicas = self.status()["deployments"].values()
        return [item["pid"] for items in replicas for item in items if item["pid"] is not None]

    def ray_folder(self) -> Path | None:
        """Where Ray keeps its sockets and logs; None without Ray."""
        folder = json.loads((self.state / "processes.json").read_text())["folder"]
        return Path(folder) if folder else None

    def pid_at(self, address: str) -> int:
        """Of the process that serves at an address."""
        items = [item for items in self.status()["deployments"].values() for item in items]
        return next(int(item["pid"]) for item in items if item["address"] == address)

    def kill(self, service: str, index: int = 0) -> int:
        """SIGKILL to one replica; returns its process id."""
        pid: int = self.status()["deployments"][service][index]["pid"]
        os.kill(pid, signal.SIGKILL)
        return pid

    def owner_pid(self, session_id: str) -> int:
        """The orchestrator that owns a session, as the session store says."""
        from redis import Redis

        store = next(iter(self.status()["deployments"]["valkey"]))["address"]
        with Redis.from_url(store) as redis:
            address = redis.hget(f"f:{{{DEFAULT_TENANT}:{session_id}}}:m", "address")
        assert isinstance(address, bytes)
        return self.pid_at(address.decode())

    def wait_whole(self) -> None:
        """Waits until every replica runs again."""
        counts = self._arguments[self._arguments.index("--replicas") + 1] if "--replicas" in self._arguments else ""
        wanted = {
            service: int(count) for service, _, count in (part.partition("=") for part in counts.split(",") if part)
        }

        def whole() -> bool:
            description = self.status()
            deployments = description["deployments"]
            states = {item["state"] for items in deployments.values() for item in items}
            complete = all(len(deployments.get(service, ())) >= count for service, count in wanted.items())
            return bool(description["ready"]) and states == {"RUNNING"} and complete

        wait_for(whole, 60, "a whole system")
