"""The state of a replica: what Serve says, and what the kernel knows better."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.local.replicas import serve_replicas
from services.local.state import ProcessState

Start = Callable[[str], int]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts processes that look like workers of Ray."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(title: str) -> int:
        with (tmp_path / "worker.out").open("ab") as log:
            command = [title, "-c", "import sys; sys.stdin.read()"]
            process = subprocess.Popen(command, executable=sys.executable, stdin=subprocess.PIPE, stdout=log)
        started.append(process)
        return process.pid

    yield begin
    for process in started:
        process.communicate()


def states(
    folder: Path, present: dict[str, list[int]], left: dict[str, list[int]]
) -> dict[int | None, tuple[str, str]]:
    """State and address of each process, by its pid."""
    told = {
        name: {
            service: [{"pid": pid, "address": f"127.0.0.1:{pid}", "node": "127.0.0.1"} for pid in pids]
            for service, pids in group.items()
        }
        for name, group in (("present", present), ("left", left))
    }
    (folder / "directory.json").write_text(json.dumps(told))
    found = serve_replicas(folder, folder / "directory.json")
    return {item.process.pid if item.process else None: (item.service, item.state.name) for item in found}


def test_what_lives_and_what_serve_tells_of_make_the_state(tmp_path: Path, start: Start) -> None:
    running, draining, starting = (start("ray::ServeReplica:fermata:Shard") for _ in range(3))
    start("ray::ServeController")
    start("ray::ServeReplica:another:Shard")
    found = states(tmp_path, {"shard": [running, 2**22 + 1]}, {"shard": [draining, 2**22 + 2]})
    assert found == {
        running: ("shard", ProcessState.RUNNING.name),
        draining: ("shard", ProcessState.DRAINING.name),
        starting: ("shard", ProcessState.STARTING.name),
        None: ("shard", ProcessState.DEAD.name),
    }


def test_before_anything_is_told(tmp_path: Path, start: Start) -> None:
    pid = start("ray::ServeReplica:fermata:Tokenizer.method")
    (item,) = serve_replicas(tmp_path, tmp_path / "none.json")
    assert item.process is not None
    assert (item.process.pid, item.service, item.state, item.address) == (pid, "tokenizer", ProcessState.STARTING, "")
