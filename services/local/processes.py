"""Names of processes that stay true: pid, start time and boot, and how to end those that are not our children.

A pid alone is reused; together with the start time of `/proc/PID/stat` (clock ticks since the boot) and the id of the
boot it names one process for ever. Knows Linux's `/proc` and pidfds, and nothing of services.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_STATE, _START_TIME = 0, 19  # fields 3 and 22 of stat(5), counted from behind the name
_USER_TIME, _SYSTEM_TIME, _RESIDENT_PAGES = 11, 12, 21  # fields 14, 15 and 24


class ProcessName(NamedTuple):
    """One process, for ever."""

    pid: int
    start_ticks: int
    boot_id: str


class Usage(NamedTuple):
    """What a process has used so far."""

    cpu_seconds: float
    memory_bytes: int


def name_of(pid: int) -> ProcessName | None:
    """The name of a running process; None when there is none (a zombie does not run)."""
    fields = _stat(pid)
    return None if fields is None else ProcessName(pid, int(fields[_START_TIME]), _boot_id())


def this_process() -> ProcessName:
    """The name of this process."""
    name = name_of(os.getpid())
    assert name is not None, "a process that asks runs"
    return name


def is_running(process: ProcessName) -> bool:
    """Whether this very process runs."""
    return name_of(process.pid) == process


def usage_of(process: ProcessName) -> Usage | None:
    """CPU time and resident memory; None when the process is gone."""
    fields = _stat(process.pid) if is_running(process) else None
    if fields is None:
        return None
    ticks = int(fields[_USER_TIME]) + int(fields[_SYSTEM_TIME])
    return Usage(ticks / os.sysconf("SC_CLK_TCK"), int(fields[_RESIDENT_PAGES]) * os.sysconf("SC_PAGE_SIZE"))


def using(folder: Path) -> list[ProcessName]:
    """Processes of a folder: those that have it on their command line, and those whose output goes to a file in it.

    Ray's own processes do the first and its workers the second, also when they have lost their parents.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid() and _uses(entry, str(folder)):
            name = name_of(int(entry.name))
            if name is not None:
                found.append(name)
    return found


def title_of(process: ProcessName) -> str:
    """The command line; Ray's workers write there what they run."""
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _uses(entry: Path, folder: str) -> bool:
    try:
        return folder in (entry / "cmdline").read_bytes().decode(errors="replace") or str(
            (entry / "fd" / "1").readlink()
        ).startswith(folder + "/")
    except OSError:  # it is gone, or somebody else's
        return False


def end(processes: Sequence[ProcessName], grace: float) -> None:
    """Ends processes that may be anybody's children: SIGTERM, and SIGKILL for what still runs after `grace` seconds.

    Returns when all are gone. A signal goes through a pidfd that was opened before the start time was compared, so it
    cannot hit a process that got the pid later.
    """
    with contextlib.ExitStack() as stack:
        running = {descriptor for process in processes for descriptor in stack.enter_context(_opened(process))}
        for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, None)):
            for descriptor in running:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, number)
            running -= _wait(running, patience)


@contextlib.contextmanager
def _opened(process: ProcessName) -> Iterator[Sequence[int]]:
    """A pidfd of the process, or none when it does not run any more."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        yield ()
        return
    try:
        yield (descriptor,) if is_running(process) else ()
    finally:
        os.close(descriptor)


def _wait(descriptors: set[int], patience: float | None) -> set[int]:
    """Waits until the processes of all pidfds are gone, at most `patience` seconds; returns those that are."""
    gone: set[int] = set()
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    deadline = None if patience is None else time.monotonic() + patience
    while gone != descriptors:
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = poll.poll(left)
        if not ready:
            break
        for descriptor, _ in ready:
            poll.unregister(descriptor)
            gone.add(descriptor)
    return gone


def _stat(pid: int) -> list[str] | None:
    """Fields of `/proc/PID/stat` from the third on; None when the process is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 1 :].split()  # the name before it may hold blanks and brackets
    return None if fields[_STATE] in "ZX" else fields


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
