"""The state of the machine beside a measurement: memory bandwidth, peak arithmetic, and what other processes use.

Knows C sources, `/proc` and pids; no engines.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Set
from pathlib import Path
from typing import Self

SOURCES = Path(__file__).parent / "probes"
LARGE = 512 << 20
"""Bytes of the set whose reading is called the bandwidth of memory."""

_TICK = os.sysconf("SC_CLK_TCK")


class Bandwidth:
    """A process that reads memory when it is asked to, and sleeps otherwise."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Compiles the probe unless that was done.

        Raises:
            RuntimeError: there is no C compiler, or it fails.
        """
        command = [compiled("bandwidth", folder), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @property
    def own_processes(self) -> set[int]:
        """Its process and this one."""
        return {os.getpid(), self._process.pid}

    def measure(self, size: int = LARGE) -> float:
        """Gigabytes per second that all threads together read from a set of so many bytes, at most `LARGE`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{size}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def peak(folder: Path, threads: int) -> dict[str, float]:
    """Billions of operations per second that the cores reach out of registers, by precision.

    Raises:
        RuntimeError: there is no C compiler, or it fails.
    """
    output = subprocess.run([compiled("peak", folder), str(threads)], capture_output=True, check=True, text=True).stdout
    rates = zip(("fp32", "bf16", "int8"), map(float, output.split()), strict=True)
    return {precision: rate for precision, rate in rates if rate}


def compiled(name: str, folder: Path) -> str:
    """Path of a probe's program, compiled into a folder for this machine if it is not there yet.

    Raises:
        RuntimeError: there is no C compiler, or it fails.
    """
    source, program = SOURCES / f"{name}.c", folder / f"{name}-{platform.machine()}"
    if program.exists() and program.stat().st_mtime >= source.stat().st_mtime:
        return str(program)
    compiler = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
    if compiler is None:
        raise RuntimeError("no C compiler (cc, gcc, clang) was found for the probes of the machine")
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-pthread"]
    done = subprocess.run([compiler, *flags, source, "-o", program], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{compiler} could not compile {source}:\n{done.stderr}")
    return str(program)


class ForeignLoad:
    """Cores that other processes and other guests of the host take while the block runs.

    Attributes:
        cores: the result, once the block is left.
    """

    def __init__(self, own: Set[int]) -> None:
        """`own` are processes that are not foreign, nor is the session that one of them leads."""
        self._own = own
        self.cores = 0.0

    def __enter__(self) -> Self:
        self._begin = time.perf_counter()
        self._before = self._foreign_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._begin
        self.cores = max(0.0, self._foreign_seconds() - self._before) / seconds

    def _foreign_seconds(self) -> float:
        own = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if int(fields[3]) in self._own or int(path.parent.name) in self._own:
                own += int(fields[11]) + int(fields[12])
        user, nice, system, _, _, interrupt, soft_interrupt, steal = map(
            int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        )
        return (user + nice + system + interrupt + soft_interrupt + steal - own) / _TICK


def describe() -> str:
    """Processor and number of cores, for the head of a report."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}"
