"""The life of a service's process: real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common import process

ROOT = Path(__file__).resolve().parents[3]

SERVER = """
import asyncio, sys, time
from services.common import logs, process, rpc

async def leave():
    print("draining", flush=True)
    await asyncio.sleep(float(sys.argv[2]))
    print("drained", flush=True)

async def main():
    server = rpc.inside_server()
    port = rpc.bind(server, "127.0.0.1", 0)
    serving, host = process.Serving((port,), dict), process.SignalHost(int(sys.argv[1]))
    await process.run(server, serving, host, on_stop=leave, grace=0.5)
    print("after", flush=True)

logs.configure_logging("example")
asyncio.run(main())
"""


class Served:
    """A process that serves nothing."""

    def __init__(self, drain_seconds: float) -> None:
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(writing), str(drain_seconds)],
            cwd=ROOT,
            pass_fds=[writing],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(writing)
        with os.fdopen(reading) as pipe:
            self.ready = pipe.read()  # to the end: the descriptor must be closed after the line

    def end(self) -> tuple[str, str]:
        return self.process.communicate(timeout=10)


@pytest.fixture
def started() -> Iterator[list[Served]]:
    started: list[Served] = []
    yield started
    for served in started:
        served.process.kill()
        served.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_status_0(started: list[Served], number: int) -> None:
    started.append(served := Served(0.05))
    assert int(served.ready) > 0 and served.ready.endswith("\n")
    served.process.send_signal(number)
    output, errors = served.end()
    assert served.process.returncode == 0
    assert output.split() == ["draining", "drained", "after"]
    assert f"I example[{served.process.pid}]" in errors and "stopped" in errors


def test_further_signals_change_nothing(started: list[Served]) -> None:
    started.append(served := Served(0.2))
    served.process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    served.process.send_signal(signal.SIGTERM)
    served.process.send_signal(signal.SIGINT)
    assert served.end()[0].split() == ["draining", "drained", "after"]
    assert served.process.returncode == 0


def test_who_does_not_leave_is_cut_off(started: list[Served]) -> None:
    started.append(served := Served(60))
    begin = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    output, errors = served.end()
    assert time.monotonic() - begin < 5
    assert output.split() == ["draining", "after"]
    assert "not everybody left" in errors


def test_nobody_is_told_without_a_descriptor() -> None:
    process.announce((1234,), -1)
