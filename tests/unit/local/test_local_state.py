"""The files of a system."""

from __future__ import annotations

import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from services.local.errors import StateDirectoryBusy
from services.local.processes import ProcessName, this_process
from services.local.state import ProcessRecord, ProcessState, StateDirectory, SystemRecord

HOLDER = """
import sys
from services.local.state import StateDirectory
StateDirectory(sys.argv[1]).lock()
print(flush=True)
sys.stdin.read()
"""


def a_record() -> SystemRecord:
    return SystemRecord(
        supervisor=this_process(),
        address="127.0.0.1:7433",
        sockets=("/tmp/x.sock",),
        processes=(
            ProcessRecord("shard", 0, "127.0.0.1:1", ProcessState.RUNNING, ProcessName(5, 6, "boot")),
            ProcessRecord("shard", 1, "127.0.0.1:2", ProcessState.STARTING),
        ),
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "state")
    state.create()
    assert state.read() is None
    state.write(a_record())
    assert state.read() == a_record()
    state.forget()
    assert state.read() is None


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null"])
def test_a_torn_record_is_none(tmp_path: Path, text: str) -> None:
    state = StateDirectory(tmp_path)
    (tmp_path / "processes.json").write_text(text)
    assert state.read() is None


def test_a_change_touches_one_process() -> None:
    record = a_record()
    first, second = record.with_process("shard", 0, ProcessState.DRAINING).processes
    assert first == replace(record.processes[0], state=ProcessState.DRAINING), "it keeps its process"
    assert second == record.processes[1]
    assert record.with_process("shard", 0, ProcessState.DEAD).processes[0].process is None
    started = ProcessName(7, 8, "boot")
    assert record.with_process("shard", 1, ProcessState.RUNNING, started).processes[1].process == started


def test_the_folder_is_its_owners_alone(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "deep" / "state")
    state.create()
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700


def test_one_process_at_a_time(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(StateDirectoryBusy, match=f"in use by process {holder.pid};"):
            state.lock()
        holder.kill()
    state.lock()
    state.unlock()
