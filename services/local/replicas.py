"""The replicas of a system on Ray Serve, as a person sees them: a process each, in one of four states.

Joins what Serve says (`services.deploy` writes it to a file) with the kernel, which knows of every process at once:
RUNNING is who Serve tells of and who lives, DRAINING who has been told of and still lives, STARTING who lives and has
not been told of yet, DEAD who is told of and lives no more. Knows the titles that Ray gives its workers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.local import processes
from services.local.cluster import DEPLOYMENTS
from services.local.processes import ProcessName
from services.local.state import ProcessRecord, ProcessState

_TITLE = re.compile(r"ray::ServeReplica:fermata:(\w+)")
_SERVICES = {deployment: service for service, deployment in DEPLOYMENTS.items()}

Told = Mapping[str, Sequence[Mapping[str, Any]]]
"""By service, what its replicas tell of themselves."""


def serve_replicas(folder: Path, directory: Path) -> list[ProcessRecord]:
    """All replicas.

    Args:
        folder: Ray's.
        directory: file of `services.deploy`; need not exist yet.
    """
    present, left = _read(directory)
    living = dict(_living(folder))
    found = [*_present(present, living)]
    known = {item["pid"] for items in present.values() for item in items}
    addresses = {item["pid"]: str(item["address"]) for items in left.values() for item in items}
    for process, service in living.items():
        if process.pid not in known:
            state = ProcessState.DRAINING if process.pid in addresses else ProcessState.STARTING
            found.append(ProcessRecord(service, 0, addresses.get(process.pid, ""), state, process))
    return found


def _present(present: Told, living: Mapping[ProcessName, str]) -> Iterator[ProcessRecord]:
    """Those whom Serve tells of."""
    by_pid = {process.pid: process for process in living}
    for service, items in present.items():
        for index, item in enumerate(items):
            process = by_pid.get(item["pid"])
            state = ProcessState.DEAD if process is None else ProcessState.RUNNING
            yield ProcessRecord(service, index, str(item["address"]), state, process)


def _living(folder: Path) -> Iterator[tuple[ProcessName, str]]:
    """Processes that host a service, and which."""
    for process in processes.using(folder):
        match = _TITLE.match(processes.title_of(process))
        if match is not None and match[1] in _SERVICES:
            yield process, _SERVICES[match[1]]


def _read(directory: Path) -> tuple[Told, Told]:
    try:
        content = json.loads(directory.read_text())
    except FileNotFoundError:
        return {}, {}
    return content["present"], content["left"]
