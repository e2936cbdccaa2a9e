"""`fermata-server` as people and scripts use it: real processes, signals and terminals; services that do nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services import cli
from services.local import processes
from services.local.state import ProcessRecord, ProcessState, StateDirectory
from tests.unit.local.fake_service import accepts

ROOT = Path(__file__).resolve().parents[2]
FAKE_UP = ROOT / "tests" / "unit" / "local" / "fake_up.py"


class Server:
    """Runs `fermata-server` on one state directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = StateDirectory(folder / "state")
        self.started: list[subprocess.Popen[str]] = []

    def command(self, name: str, *flags: str) -> list[str]:
        port = ["--port=0"] if name == "up" and not any(flag.startswith("--port") for flag in flags) else []
        local = ["--local"] if name == "up" else []
        return [sys.executable, str(FAKE_UP), name, f"--state-dir={self.state.path}", *local, *port, *flags]

    def environment(self, **more: str) -> dict[str, str]:
        paths = os.pathsep.join([str(ROOT), str(FAKE_UP.parent)])
        return {"PATH": os.environ["PATH"], "PYTHONPATH": paths, **more}

    def run(self, name: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        return subprocess.run(
            self.command(name, *flags),
            cwd=self.folder,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def start(
        self, *flags: str, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """Starts `up` and returns at once."""
        process = subprocess.Popen(
            self.command("up", *flags),
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def up(self, *flags: str) -> tuple[subprocess.Popen[str], str]:
        """Starts `up` and returns it with its public HOST:PORT when it is ready."""
        process = self.start(*flags)
        assert process.stdout is not None
        return process, address_in(process.stdout.readline())

    def processes(self) -> list[ProcessRecord]:
        record = self.state.read()
        assert record is not None
        return list(record.processes)


def address_in(line: str) -> str:
    match = re.fullmatch(r"ready grpc://(127\.0\.0\.1:\d+)\s+", line)
    assert match, line
    return match[1]


def end(process: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[int, str, str]:
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    return process.returncode, stdout, stderr


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path)
    yield started
    for process in started.started:
        if process.poll() is None:
            process.terminate()
        process.communicate()
    started.run("down")


def assert_nothing_is_left(server: Server, before: list[ProcessRecord], address: str) -> None:
    assert [item.service for item in before] == ["valkey", "shard", "orchestrator", "tokenizer"]
    for item in before:
        assert item.process is not None
        assert not processes.is_running(item.process)
        assert item.service == "valkey" or not accepts(item.address)
    assert not accepts(address)
    assert sorted(path.name for path in server.state.path.iterdir()) == ["lock", "logs", "store"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_up_is_ready_stays_and_leaves_nothing(server: Server, number: int) -> None:
    process, address = server.up()
    assert accepts(address)
    before = server.processes()
    status, stdout, stderr = end(process, number)
    assert (status, stdout) == (0, ""), "one line on standard output, and that was read before"
    assert "shard-0 is ready on 127.0.0.1:" in stderr
    assert_nothing_is_left(server, before, address)


def test_what_a_killed_up_left_behind_is_ended_by_the_next_one(server: Server) -> None:
    process, address = server.up()
    before = server.processes()
    assert end(process, signal.SIGKILL)[0] == -signal.SIGKILL
    assert all(item.process is not None and processes.is_running(item.process) for item in before)
    port = address.rpartition(":")[2]
    again, address = server.up(f"--port={port}")
    assert accepts(address), "on the same port, which its predecessor's tokenizer still had"
    assert not any(item.process is not None and processes.is_running(item.process) for item in before)
    pids = [item.process.pid for item in before if item.process is not None]
    now = server.processes()
    _, _, stderr = end(again)
    assert all(f" {pid}, left behind" in stderr for pid in pids)
    assert_nothing_is_left(server, now, address)


def test_what_a_killed_up_left_behind_is_ended_by_down(server: Server) -> None:
    process, address = server.up()
    before = server.processes()
    end(process, signal.SIGKILL)
    shown = json.loads(server.run("status", "--json").stdout)
    assert not shown["ready"]
    assert [item[0]["state"] for item in shown["deployments"].values()] == ["RUNNING"] * 4
    done = server.run("down")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "stopped")
    assert_nothing_is_left(server, before, address)


def test_detached_it_returns_when_ready_and_down_ends_it(server: Server) -> None:
    done = server.run("up", "--detach", "--local")
    assert (done.returncode, done.stderr) == (0, "")
    address = address_in(done.stdout)
    assert accepts(address)
    before = server.processes()
    assert all(item.state is ProcessState.RUNNING for item in before)
    assert "tokenizer-0 is ready" in server.state.log.read_text()
    shown = server.run("status")
    assert shown.returncode == 0
    assert f"grpc://{address}" in shown.stdout.splitlines()[0]
    assert server.run("down").returncode == 0
    assert_nothing_is_left(server, before, address)
    assert server.run("down").returncode == 0, "twice does no harm"


def test_detached_it_starts_this_very_program(tmp_path: Path) -> None:
    done = subprocess.run([*cli.PROGRAM, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "fermata-server up" in done.stdout


@pytest.mark.parametrize("flags", [(), ("--detach",)])
def test_what_cannot_start_says_why(server: Server, flags: tuple[str, ...]) -> None:
    done = server.run("up", *flags, FAKE_FAILS="shard")
    assert (done.returncode, done.stdout) == (1, "")
    assert "shard-0 ended with status 1 before it was ready" in done.stderr
    assert "cannot load the model" in done.stderr
    assert "Traceback" not in done.stderr
    assert server.state.read() is None


def test_a_second_up_is_refused_and_names_the_first(server: Server) -> None:
    process, address = server.up()
    refused = server.run("up")
    assert refused.returncode == 1
    assert f"in use by process {process.pid};" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert accepts(address)


def test_a_taken_port_is_refused_in_one_line(server: Server) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused = server.run("up", f"--port={port}")
    assert refused.returncode == 1
    assert refused.stderr == f"fermata-server: cannot use 127.0.0.1:{port}: another process listens there\n"


def test_a_signal_during_the_start_leaves_nothing(server: Server) -> None:
    process = server.start()
    while (record := server.state.read()) is None or len(record.processes) < 4:
        time.sleep(0.005)
    status, stdout, stderr = end(process)
    assert (status, stdout) in ((1, ""), (0, f"ready grpc://{record.address}\n")), stderr
    assert server.state.read() is None
    assert sorted(path.name for path in server.state.path.iterdir()) == ["lock", "logs", "store"]


def test_status_where_nothing_runs(server: Server) -> None:
    shown = server.run("status", "--json")
    assert shown.returncode == 1
    assert json.loads(shown.stdout)["deployments"] == {}
    assert not server.state.path.exists(), "looking changes nothing"


@pytest.mark.parametrize(
    "arguments", [["up", "--replicas=shard=0"], ["up", "--detach", "--chat"], ["upp"], [], ["up", "--por=1"]]
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: fermata-server" in capsys.readouterr().err


def test_without_a_terminal_one_message_is_answered(server: Server) -> None:
    process, address = server.up("--chat")
    assert process.stdout is not None
    assert process.stdout.readline() == f"{address} is asked: {cli.FIRST_MESSAGE} {cli.FIRST_OPTIONS}\n"
    assert process.poll() is None
    status, stdout, _ = end(process, signal.SIGTERM)
    assert (status, stdout) == (0, "")


class Terminal:
    """A terminal in which `up --chat` runs."""

    def __init__(self, server: Server) -> None:
        self.shown = ""
        self._ours, theirs = pty.openpty()
        arguments = server.command("up", "--chat")
        # The program becomes the leader of a session whose terminal this is, as under a login shell.
        start = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, *arguments],
            cwd=server.folder,
            env=server.environment(),
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        server.started.append(self.process)
        os.close(theirs)

    def wait_for(self, text: str) -> None:
        while text not in self.shown:
            self.shown += os.read(self._ours, 4096).decode()
        self.shown = self.shown.partition(text)[2]

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def close(self) -> None:
        os.close(self._ours)


@pytest.fixture
def terminal(server: Server) -> Iterator[Terminal]:
    opened = Terminal(server)
    opened.wait_for("ready grpc://")
    opened.wait_for("you: ")
    yield opened
    with contextlib.suppress(OSError):
        opened.close()


CONTROL_C, CONTROL_D = "\x03", "\x04"


def test_in_a_terminal_ctrl_c_cancels_a_reply_and_then_ends_everything(server: Server, terminal: Terminal) -> None:
    for _ in range(2):
        terminal.type("hello\n")
        terminal.wait_for("a reply begins")
        terminal.type(CONTROL_C)
        terminal.wait_for("the reply is cancelled")
        terminal.wait_for("you: ")
    before = server.processes()
    assert all(item.state is ProcessState.RUNNING for item in before), "Ctrl-C reaches no service"
    terminal.type(CONTROL_C)
    assert terminal.process.wait(30) == 0
    assert server.state.read() is None
    assert not any(item.process is not None and processes.is_running(item.process) for item in before)


def test_ctrl_d_ends_the_chat_and_the_system_stays_up(server: Server, terminal: Terminal) -> None:
    terminal.type(CONTROL_D)
    assert terminal.process.stderr is not None
    while "stays up" not in terminal.process.stderr.readline():
        pass
    assert accepts(server.state.read().address)  # type: ignore[union-attr]
    terminal.type(CONTROL_C)
    assert terminal.process.wait(30) == 0
    assert server.state.read() is None


@pytest.mark.parametrize("during_a_reply", [False, True])
def test_a_term_signal_ends_chat_and_system(server: Server, terminal: Terminal, during_a_reply: bool) -> None:
    if during_a_reply:
        terminal.type("hello\n")
        terminal.wait_for("a reply begins")
    terminal.process.terminate()
    assert terminal.process.wait(30) == 0
    assert server.state.read() is None


def test_a_closed_terminal_ends_everything(server: Server, terminal: Terminal) -> None:
    terminal.close()
    assert terminal.process.wait(30) == 0
    assert server.state.read() is None


def test_restarts_do_not_disturb_the_chat(server: Server, terminal: Terminal) -> None:
    shard = server.processes()[1].process
    assert shard is not None
    os.kill(shard.pid, signal.SIGKILL)
    while not server.state.log.exists() or "started again" not in server.state.log.read_text():
        time.sleep(0.01)
    terminal.type(CONTROL_C)
    assert terminal.process.stderr is not None
    assert "started again" not in terminal.process.stderr.read()


def test_under_nohup_it_outlives_the_terminal(server: Server) -> None:
    process = subprocess.Popen(
        ["nohup", *server.command("up")],
        cwd=server.folder,
        env=server.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    server.started.append(process)
    assert process.stdout is not None
    address = address_in(process.stdout.readline())
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    assert accepts(address)
    assert end(process, signal.SIGTERM)[0] == 0
