"""Naming processes and ending those that are not our children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from services.local import processes

SLEEPER = [sys.executable, "-S", "-c", "import time; print(flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-S",
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)",
]


@pytest.fixture
def spawn() -> Iterator[object]:
    children: list[subprocess.Popen[bytes]] = []

    def start(command: list[str]) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        children.append(child)
        assert child.stdout is not None
        child.stdout.readline()  # it runs its own code now
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def named(child: subprocess.Popen[bytes]) -> processes.ProcessName:
    name = processes.name_of(child.pid)
    assert name is not None
    return name


def test_a_name_holds_while_the_process_runs(spawn) -> None:  # type: ignore[no-untyped-def]
    child = spawn(SLEEPER)
    name = named(child)
    assert processes.is_running(name)
    assert not processes.is_running(name._replace(start_ticks=name.start_ticks + 1)), "the pid was reused"
    assert not processes.is_running(name._replace(boot_id="another")), "the machine was restarted"
    child.kill()
    child.wait()
    assert not processes.is_running(name)
    assert processes.name_of(child.pid) is None


def test_a_zombie_does_not_run(spawn) -> None:  # type: ignore[no-untyped-def]
    child = spawn(SLEEPER)
    name = named(child)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended and nobody has reaped it
    assert not processes.is_running(name)


def test_usage_is_of_this_process() -> None:
    mine = processes.this_process()
    before = processes.usage_of(mine)
    deadline = time.process_time() + 0.05
    while time.process_time() < deadline:
        pass
    after = processes.usage_of(mine)
    assert before is not None
    assert after is not None
    assert 0.03 <= after.cpu_seconds - before.cpu_seconds < 5
    assert 5e6 < after.memory_bytes < 5e10
    assert processes.usage_of(mine._replace(boot_id="another")) is None


def test_ends_with_a_term_signal(spawn) -> None:  # type: ignore[no-untyped-def]
    children = [spawn(SLEEPER), spawn(SLEEPER)]
    processes.end([named(child) for child in children], grace=10)
    assert [child.wait() for child in children] == [-signal.SIGTERM] * 2


def test_kills_what_ignores_the_term_signal(spawn) -> None:  # type: ignore[no-untyped-def]
    child = spawn(STUBBORN)
    began = time.monotonic()
    processes.end([named(child)], grace=0.2)
    assert child.wait() == -signal.SIGKILL
    assert 0.2 <= time.monotonic() - began < 5


def test_spares_a_process_that_only_has_the_pid(spawn) -> None:  # type: ignore[no-untyped-def]
    child = spawn(SLEEPER)
    name = named(child)
    processes.end([name._replace(start_ticks=name.start_ticks - 1)], grace=0.1)
    assert child.poll() is None
