"""`up`, `down`, `status`: ready quickly, nothing left behind, clean after a kill (DESIGN: Supervision)."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.system import UpSystem, client, is_running, server_command, wait_for

pytestmark = pytest.mark.timeout(240)


def ports_of(system: UpSystem) -> list[int]:
    addresses = [system.address]
    addresses += [item["address"] for items in system.status()["deployments"].values() for item in items]
    return [int(address.rpartition(":")[2]) for address in addresses if not address.startswith("unix:")]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def assert_nothing_is_left(system: UpSystem, pids: list[int], ports: list[int]) -> None:
    wait_for(lambda: not any(is_running(pid) for pid in pids), 15, "the end of all processes")
    assert not any(listens(port) for port in ports)
    assert [path for path in system.state.rglob("*") if path.is_socket()] == []


def test_an_interrupt_leaves_nothing_and_the_next_start_is_quick(tmp_path: Path) -> None:
    system = UpSystem(tmp_path / "state")
    with system:
        pids, ports = system.pids(), ports_of(system)
        assert len(pids) == 4
        assert all(listens(port) for port in ports)
        first = client("generate", "hello", "--greedy", "--max-tokens", "5", server=system.address)
        assert first.returncode == 0, first.stderr
        generation = first.stderr.split()[1]
    assert system.process is not None
    assert system.process.returncode == 0
    assert_nothing_is_left(system, pids, ports)
    with system:
        assert system.ready_seconds <= 20
        again = client("resume", generation, server=system.address)
        assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr


def test_a_killed_supervisor_is_cleaned_up_by_the_next_one(tmp_path: Path) -> None:
    system = UpSystem(tmp_path / "state")
    system.start()
    pids, ports = system.pids(), ports_of(system)
    assert system.stop(signal.SIGKILL) == -signal.SIGKILL
    assert all(is_running(pid) for pid in pids)
    with system:
        assert not any(is_running(pid) for pid in pids)
        assert client("generate", "hello", "--max-tokens", "3", server=system.address).returncode == 0
        later = system.pids()
    assert_nothing_is_left(system, pids + later, ports)


def test_down_ends_what_a_killed_supervisor_left(tmp_path: Path) -> None:
    system = UpSystem(tmp_path / "state")
    system.start()
    pids, ports = system.pids(), ports_of(system)
    system.stop(signal.SIGKILL)
    assert subprocess.run(server_command("down", "--state-dir", str(system.state)), check=False).returncode == 0
    assert_nothing_is_left(system, pids, ports)


def test_a_second_up_and_a_taken_port_are_refused(tmp_path: Path) -> None:
    with UpSystem(tmp_path / "state") as system:
        port = system.address.rpartition(":")[2]
        for arguments, said in (
            (["--state-dir", str(system.state)], str(system.process.pid) if system.process else ""),
            (["--state-dir", str(tmp_path / "other"), "--port", port], port),
        ):
            refused = subprocess.run(
                server_command("up", *arguments), capture_output=True, text=True, timeout=30, check=False
            )
            assert refused.returncode == 1
            assert said in refused.stderr
            assert refused.stdout == ""


def test_without_a_terminal_one_message_is_answered_and_it_stays_up(tmp_path: Path) -> None:
    state = tmp_path / "state"
    command = server_command("up", "--chat", "--port", "0", "--state-dir", str(state))
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready grpc://127.0.0.1:")
        assert process.stdout.readline().strip()
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait(30) == 0


class Terminal:
    """A terminal that a program runs in."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.execv(command[0], command)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def expect(self, pattern: str, seconds: float = 60.0) -> str:
        """Reads until a pattern appears in what came since the last one."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen!r}"
            if select.select([self._file], [], [], 0.1)[0]:
                self.seen += os.read(self._file, 4096).decode(errors="replace")
        self.seen = self.seen[match.end() :]
        return match[0]

    def quiet(self, seconds: float) -> bool:
        """Whether nothing more comes."""
        return not select.select([self._file], [], [], seconds)[0]

    def wait(self) -> int:
        """Exit status of the program, which must end."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if select.select([self._file], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._file, 4096).decode(errors="replace")
                except OSError:  # the other end is closed
                    time.sleep(0.05)
        raise AssertionError("the program did not end")


def test_a_chat_in_a_terminal(tmp_path: Path) -> None:
    state = tmp_path / "state"
    terminal = Terminal(server_command("up", "--chat", "--port", "0", "--state-dir", str(state)))
    address = terminal.expect(r"ready grpc://\S+").removeprefix("ready grpc://")
    terminal.expect(r"> ")
    terminal.type("Tell me a long story about a fox and a lantern\n")
    terminal.expect(r"\n[^\n]{3,}")  # the echo is followed by the first words of a reply
    terminal.type("\x03")  # cancels the reply, or comes after its end and is typed once more below
    terminal.expect(r"> ")
    terminal.type("hello\n")
    terminal.expect(r"> ")
    terminal.type("\x04")  # the chat ends, the system stays
    time.sleep(1.0)
    assert client("generate", "hi", "--max-tokens", "3", server=address).returncode == 0
    terminal.type("\x03")
    assert terminal.wait() == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
