"""Makes a shared library of the C++ sources beside, for the instruction sets that this machine has.

A build takes seconds and is kept in the user's cache under the hash of what it was made from, so that it happens once
per machine and version. Whoever builds first holds a lock; the others wait and find it there.
Knows compilers and processors; nothing of what the library does.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "source"
_COMPILERS = ("c++", "g++", "clang++")
# An exact order of additions is part of the result (R23): nothing may reorder them, but a product and a sum may fuse.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-pthread", "-Wno-psabi")


class Target(NamedTuple):
    """An instruction set: its name, the flags of `/proc/cpuinfo` that it needs, and those that the compiler gets."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_X86 = ("-march=x86-64", "-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_X86, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_BFLOAT16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
_TARGETS = (
    Target(
        "amx",
        frozenset({"amx_tile", "amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni"}),
        (*_BFLOAT16, "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-DFERMATA_AMX"),
    ),
    Target("avx512-bf16", frozenset({"avx512_bf16", "avx512_vnni", "avx512dq", "avx512vl"}), _BFLOAT16),
    Target("avx512", frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}), _AVX512),
    Target("avx2", frozenset({"avx2", "fma", "f16c", "bmi2"}), _X86),
)
_PORTABLE = Target("portable", frozenset(), ())


class CompilerMissing(Exception):
    """There is no compiler, or none that translates the sources; the text says what was tried."""


def targets() -> list[Target]:
    """The instruction sets of this machine, best first; the last one every machine has."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return [_PORTABLE]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [_PORTABLE]
    flags = frozenset(next((line for line in lines if line.startswith("flags")), "").split())
    return [*(target for target in _TARGETS if target.needs <= flags), _PORTABLE]


def build(target: Target, folder: Path | None = None, compilers: Sequence[str] = _COMPILERS) -> Path:
    """Compiles the library, or finds it where it was put before.

    Args:
        target: instruction set to use.
        folder: where libraries are kept; None takes the user's cache.
        compilers: names of programs, the first one that is there is used.

    Raises:
        CompilerMissing: there is no compiler, or it refuses.
        OSError: the folder cannot be written to.
    """
    compiler = next(filter(None, map(shutil.which, compilers)), None)
    if compiler is None:
        raise CompilerMissing(f"none of {', '.join(compilers)} is installed")
    folder = folder or Path.home() / ".cache" / "fermata" / "native"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    command = [compiler, *_FLAGS, *target.flags]
    library = folder / f"{target.name}-{_hash(command)}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(command, library)
    return library


def main() -> None:
    """Compiles ahead of the first use, which otherwise waits for it; a machine without a compiler is no error."""
    try:
        build(targets()[0])
    except (CompilerMissing, OSError) as error:
        print(f"no native kernels: {error}", file=sys.stderr)


def _compile(command: Sequence[str], library: Path) -> None:
    log.info("compiling the native kernels", extra={"library": library.name})
    partial = library.with_suffix(f".{os.getpid()}")
    try:
        done = subprocess.run(
            [*command, str(SOURCES / "library.cpp"), "-o", str(partial)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = done.stderr.splitlines()
            error = next((line for line in lines if "error" in line), " ".join(lines[:1]))
            raise CompilerMissing(f"{command[0]} cannot translate the kernels: {error}")
        partial.replace(library)
    finally:
        partial.unlink(missing_ok=True)


def _hash(command: Sequence[str]) -> str:
    """Of the sources, the command and the compiler's version."""
    version = subprocess.run([command[0], "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(repr(command).encode() + version)
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    main()
