"""Keeps one program running: starts it, starts it again with back-off when it ended, and ends it with grace.

A thread per program, because all it does is wait: for the word that the program is ready, for its end, for the next
attempt. Knows nothing of services; what is ready means is a `Readiness`.
"""

from __future__ import annotations

import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.local.processes import ProcessName, name_of
from services.local.state import ProcessState

FIRST_DELAY, LONGEST_DELAY = 0.2, 5.0
STEADY_AFTER = 30.0
START_ATTEMPTS = 2
START_LIMIT = 600.0
"""Seconds that a program may take to get ready: a large model is read from a disk or from the hub meanwhile."""
_PROBE_INTERVAL = 0.01
_LOG_TAIL_LINES = 20


class Readiness(Protocol):
    """How a program tells that it is ready. One object serves one start."""

    def arguments(self) -> Sequence[str]:
        """Flags that the program needs to tell."""
        ...

    def descriptors(self) -> Sequence[int]:
        """File descriptors that the program inherits."""
        ...

    def wait(self, process: subprocess.Popen[bytes], limit: float) -> bool:
        """Waits until the program is ready: True, or until it ended or `limit` seconds are over: False."""
        ...


class ReadyPipe:
    """The program writes a line to a pipe when it is ready; the pipe's end without one is the program's."""

    def __init__(self, expected: str) -> None:
        """Begins to listen.

        Args:
            expected: the line, without its end; a program that tells other ports than it was given is not ready.
        """
        self._expected = expected
        self._reader, self._writer = os.pipe()

    def arguments(self) -> Sequence[str]:
        """The flag of the pipe."""
        return (f"--ready-fd={self._writer}",)

    def descriptors(self) -> Sequence[int]:
        """The end to write to."""
        return (self._writer,)

    def wait(self, process: subprocess.Popen[bytes], limit: float) -> bool:
        """Reads the line."""
        os.close(self._writer)  # now the program alone holds this end
        deadline, told = time.monotonic() + limit, b""
        try:
            while not told.endswith(b"\n"):
                readable, _, _ = select.select([self._reader], [], [], max(0.0, deadline - time.monotonic()))
                part = os.read(self._reader, 4096) if readable else b""
                if not part:
                    return False
                told += part
            return told.decode(errors="replace").strip() == self._expected
        finally:
            os.close(self._reader)


class Probe:
    """The program is ready when a question to it is answered."""

    def __init__(self, answers: Callable[[], bool]) -> None:
        self._answers = answers

    def arguments(self) -> Sequence[str]:
        """None are needed."""
        return ()

    def descriptors(self) -> Sequence[int]:
        """None are needed."""
        return ()

    def wait(self, process: subprocess.Popen[bytes], limit: float) -> bool:
        """Asks until there is an answer."""
        deadline = time.monotonic() + limit
        while process.poll() is None and time.monotonic() < deadline:
            if self._answers():
                return True
            time.sleep(_PROBE_INTERVAL)
        return False


@dataclass(frozen=True, slots=True)
class Program:
    """What is kept running.

    Attributes:
        service: what it is part of.
        index: its place among the replicas.
        address: where it listens, at every start.
        command: the command line.
        environment: of the first start.
        restart_environment: of every later one.
        readiness: makes what tells that one start succeeded.
    """

    service: str
    index: int
    address: str
    command: Sequence[str]
    environment: Mapping[str, str]
    restart_environment: Mapping[str, str]
    readiness: Callable[[], Readiness]

    @property
    def name(self) -> str:
        """SERVICE-INDEX."""
        return f"{self.service}-{self.index}"


@dataclass(frozen=True, slots=True)
class Change:
    """Something happened to a program.

    Attributes:
        process: the process it happened to; None when it is gone.
        text: one line for people; empty when it says nothing new.
        failure: why there will be no further attempt to start it; empty otherwise.
    """

    program: Program
    state: ProcessState
    process: ProcessName | None
    text: str = ""
    failure: str = ""


class Backoff:
    """Delays between attempts: doubling from 0.2 s to 5 s, and from the beginning after a life of 30 s."""

    def __init__(self) -> None:
        self._next = FIRST_DELAY

    def after(self, lived: float) -> float:
        """The delay after a life of `lived` seconds."""
        if lived >= STEADY_AFTER:
            self._next = FIRST_DELAY
        delay, self._next = self._next, min(2 * self._next, LONGEST_DELAY)
        return delay


class Keeper:
    """Keeps one program running from `start` to `ask_to_stop`."""

    def __init__(self, program: Program, log: Path, notify: Callable[[Change], None]) -> None:
        """Prepares; starts nothing.

        Args:
            program: what to run.
            log: file that its output is appended to.
            notify: told of every change, from the keeper's thread.
        """
        self.program = program
        self._log, self._notify = log, notify
        self._thread = threading.Thread(target=self._run, name=program.name, daemon=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._launching = threading.Lock()
        self._stopping = threading.Event()
        self._was_ready = False

    def start(self) -> None:
        """Starts the program; returns at once."""
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Sends SIGTERM and starts nothing any more; returns at once."""
        with self._launching:
            self._stopping.set()
            if self._process is not None:
                self._process.terminate()

    def wait_stopped(self, grace: float) -> None:
        """Waits for the program's end, and sends SIGKILL after `grace` seconds. Must follow `ask_to_stop`."""
        self._thread.join(grace)
        self.hurry()
        self._thread.join()

    def hurry(self) -> None:
        """Sends SIGKILL if the program was asked to stop; safe in a signal handler."""
        if self._stopping.is_set() and self._process is not None:
            self._process.kill()

    def _run(self) -> None:
        backoff, attempt = Backoff(), 0
        while not self._stopping.is_set():
            began, attempt = time.monotonic(), attempt + 1
            log_end = self._log.stat().st_size if self._log.exists() else 0
            ending = f"{self.program.name} {self._live_once(first=attempt == 1)}"
            if self._stopping.is_set():
                break
            if attempt == START_ATTEMPTS and not self._was_ready:
                failure = f"{ending} before it was ready, {attempt} times; the end of {self._log}:\n"
                self._tell(ProcessState.DEAD, failure=failure + log_tail(self._log, log_end))
                return
            delay = backoff.after(time.monotonic() - began)
            self._tell(ProcessState.DEAD, text=f"{ending}; it is started again in {delay:.1f} s")
            self._stopping.wait(delay)
        self._tell(ProcessState.DEAD)

    def _live_once(self, *, first: bool) -> str:
        """Starts the program and waits for its end; returns how it ended."""
        began = time.monotonic()
        with self._launching:
            if self._stopping.is_set():
                return "was not started"
            readiness = self.program.readiness()
            try:
                self._process = process = self._launch(readiness, first=first)
            except OSError as error:  # no memory or no process left, which may pass
                return f"could not be started ({error})"
        name = name_of(process.pid)
        self._tell(ProcessState.STARTING, process=name)
        if readiness.wait(process, START_LIMIT):
            self._was_ready = True
            text = f"{self.program.name} is ready on {self.program.address} after {time.monotonic() - began:.1f} s"
            self._tell(ProcessState.RUNNING, process=name, text=text)
        elif not self._stopping.is_set():
            process.kill()  # it hangs; nothing happens to one that has ended
        status = process.wait()
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"

    def _launch(self, readiness: Readiness, *, first: bool) -> subprocess.Popen[bytes]:
        """Starts the program in a session of its own: Ctrl-C in the terminal reaches the supervisor alone."""
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*self.program.command, *readiness.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.program.environment if first else self.program.restart_environment,
                pass_fds=readiness.descriptors(),
                start_new_session=True,
            )

    def _tell(
        self, state: ProcessState, *, process: ProcessName | None = None, text: str = "", failure: str = ""
    ) -> None:
        self._notify(Change(self.program, state, process, text, failure))


def log_tail(log: Path, begin: int = 0) -> str:
    """The last lines of a log that were written behind byte `begin`."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-_LOG_TAIL_LINES:]) or "(nothing)"
