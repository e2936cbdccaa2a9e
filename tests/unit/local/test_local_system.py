"""A whole system: a real session store, and services that do nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import redis

from services.config import SystemConfig
from services.local import processes
from services.local.errors import Interrupted, NoSessionStore, PortTaken, StartFailed, StateDirectoryBusy
from services.local.processes import ProcessName
from services.local.state import ProcessRecord, ProcessState, StateDirectory
from services.local.system import System, end_leftovers, take_down
from tests.unit.local.fake_service import MODULES, accepts

HERE = Path(__file__).parent


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    return StateDirectory(tmp_path / "state")


def environment(**more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE), **more}


def system(state: StateDirectory, *, report: list[str] | None = None, **settings: Any) -> System:
    variables: Mapping[str, str] = settings.pop("environment", environment())
    return System(
        SystemConfig(**{"port": 0, "local": True, "state_dir": str(state.path), **settings}),
        environment=variables,
        report=(report if report is not None else []).append,
        is_served=accepts,
        modules=MODULES,
    )


@pytest.fixture
def running(state: StateDirectory) -> Iterator[System]:
    with system(state, replicas=("tokenizer=2", "shard=2")) as started:
        started.start()
        yield started


def processes_of(state: StateDirectory, service: str) -> list[ProcessRecord]:
    record = state.read()
    assert record is not None
    return [item for item in record.processes if item.service == service]


def process_of(state: StateDirectory, service: str, index: int = 0) -> ProcessName:
    process = processes_of(state, service)[index].process
    assert process is not None
    return process


def command_line(state: StateDirectory, service: str, index: int = 0, life: int = 0) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(state.log_of(service, index).read_text().splitlines()[life])
    return told


def wait_for(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_restarted(state: StateDirectory, service: str, before: ProcessName) -> bool:
    item = processes_of(state, service)[0]
    return item.state is ProcessState.RUNNING and item.process not in (None, before)


def nothing_is_left(state: StateDirectory, before: list[ProcessRecord], address: str) -> None:
    assert before
    assert not any(processes.is_running(item.process) for item in before if item.process is not None)
    assert sorted(path.name for path in state.path.iterdir()) == ["lock", "logs", "store"], "no socket and no record"
    for listening in (address, *(item.address for item in before if item.service != "valkey")):
        assert not accepts(listening)


def test_everything_runs_and_knows_each_other(running: System, state: StateDirectory) -> None:
    record = state.read()
    assert record is not None
    assert record.ready
    assert record.supervisor == processes.this_process()
    assert record.address == running.address
    assert [f"{item.service}-{item.index}" for item in record.processes] == [
        "valkey-0", "shard-0", "shard-1", "orchestrator-0", "tokenizer-0", "tokenizer-1"
    ]  # fmt: skip
    for item in record.processes:
        assert item.state is ProcessState.RUNNING
        assert item.process is not None
        assert processes.is_running(item.process)
        assert item.service == "valkey" or accepts(item.address)
    shards = ",".join(item.address for item in processes_of(state, "shard"))
    orchestrator = command_line(state, "orchestrator")
    assert f"--shards={shards}" in orchestrator["flags"]
    assert f"--redis-url={record.processes[0].address}" in orchestrator["flags"]
    first, second = (command_line(state, "tokenizer", index) for index in (0, 1))
    assert first["public_port"] == second["public_port"] == int(running.address.rpartition(":")[2])
    assert f"--endpoints=127.0.0.1:{second['port']}" in first["flags"]
    assert f"--endpoints=127.0.0.1:{first['port']}" in second["flags"]
    assert len({first["port"], second["port"], first["public_port"]}) == 3


@pytest.mark.parametrize("service", ["shard", "orchestrator", "tokenizer"])
def test_a_killed_service_comes_back_where_it_was(running: System, state: StateDirectory, service: str) -> None:
    before = process_of(state, service)
    address = processes_of(state, service)[0].address
    others = {item.process for item in state.read().processes} - {before}  # type: ignore[union-attr]
    os.kill(before.pid, signal.SIGKILL)
    wait_for(lambda: is_restarted(state, service, before))
    assert accepts(address)
    assert processes_of(state, service)[0].address == address
    assert command_line(state, service, life=1)["flags"] == command_line(state, service)["flags"]
    assert others < {item.process for item in state.read().processes}, "the others live on"  # type: ignore[union-attr]


def test_the_session_store_comes_back_with_its_data(running: System, state: StateDirectory) -> None:
    url, before = processes_of(state, "valkey")[0].address, process_of(state, "valkey")
    with redis.Redis.from_url(url) as client:
        client.set("kept", "yes")
    os.kill(before.pid, signal.SIGKILL)
    wait_for(lambda: is_restarted(state, "valkey", before))
    with redis.Redis.from_url(url) as client:
        assert client.get("kept") == b"yes"


def test_nothing_is_left_after_the_end_but_logs_and_data(state: StateDirectory) -> None:
    with system(state) as started:
        started.start()
        record = state.read()
        assert record is not None
        with redis.Redis.from_url(record.processes[0].address) as client:
            client.set("kept", "yes")
    nothing_is_left(state, list(record.processes), started.address)
    with system(state) as again:
        again.start()
        with redis.Redis.from_url(processes_of(state, "valkey")[0].address) as client:
            assert client.get("kept") == b"yes", "the next system goes on with the sessions"
    assert len(state.log_of("shard", 0).read_text().splitlines()) == 2, "logs are appended to"


def test_tokenizers_end_first_and_the_session_store_last(state: StateDirectory) -> None:
    ends: list[str] = []
    with system(state) as started:
        started.start()
        for keeper in started._keepers:
            wait = keeper.wait_stopped
            keeper.wait_stopped = lambda grace, name=keeper.program.name, wait=wait: (ends.append(name), wait(grace))  # type: ignore
    assert ends == ["tokenizer-0", "orchestrator-0", "shard-0", "valkey-0"]


def test_a_store_of_somebody_else_is_used_and_left_alone(state: StateDirectory) -> None:
    with system(state, redis_url="redis://10.0.0.1/") as started:
        started.start()
        assert processes_of(state, "valkey") == []
        assert "--redis-url=redis://10.0.0.1/" in command_line(state, "orchestrator")["flags"]


def test_a_second_system_is_refused_in_the_same_folder_and_welcome_in_another(
    running: System, state: StateDirectory, tmp_path: Path
) -> None:
    with pytest.raises(StateDirectoryBusy, match=f"in use by process {os.getpid()};"), system(state) as second:
        second.start()
    assert accepts(running.address), "the first one does not notice"
    assert state.read() is not None
    elsewhere = StateDirectory(tmp_path / "another")
    with system(elsewhere) as second:
        second.start()
        assert accepts(running.address)
        assert second.address != running.address


@pytest.mark.parametrize("shared", [False, True])
def test_a_taken_public_port_is_refused_before_anything_starts(state: StateDirectory, shared: bool) -> None:
    """R19."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=f"127.0.0.1:{port}"), system(state, port=port) as refused:
            refused.start()
    assert list(state.logs.iterdir()) == []
    state.lock()  # free for the next one
    state.unlock()


def test_a_service_that_cannot_start_ends_it_with_the_reason(state: StateDirectory) -> None:
    with system(state, environment=environment(FAKE_FAILS="orchestrator")) as failing:
        with pytest.raises(StartFailed, match="orchestrator-0 ended with status 1 before it was ready") as failed:
            failing.start()
        assert "cannot load the model" in str(failed.value)
        before = list(state.read().processes)  # type: ignore[union-attr]
    nothing_is_left(state, before, failing.address)


def test_without_a_store_it_says_what_to_do(state: StateDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.local.valkey.importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoSessionStore, match="--redis-url"), system(state) as refused:
        refused.start()


def test_a_signal_ends_the_start(state: StateDirectory) -> None:
    starting = system(state)

    def interrupted(address: str) -> bool:
        starting.interrupt()
        return False

    starting._is_served = interrupted
    with pytest.raises(Interrupted), starting:
        starting.start()
    assert state.read() is None


def test_a_later_signal_leaves_no_grace(state: StateDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.local.system.SECOND_THOUGHT", 0.05)
    with system(state, environment=environment(FAKE_STUBBORN="shard")) as stubborn:
        stubborn.start()
        shard = process_of(state, "shard")
        stubborn.interrupt()
        stubborn.wait()
        time.sleep(0.1)
        stubborn.interrupt()
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert not processes.is_running(shard)


def test_two_signals_at_once_are_one(state: StateDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.local.system.STOP_GRACE", 0.5)
    with system(state, environment=environment(FAKE_STUBBORN="shard")) as stubborn:
        stubborn.start()
        stubborn.interrupt()
        stubborn.interrupt()
        began = time.monotonic()
    assert time.monotonic() - began >= 0.5, "the grace was given"


def test_failpoints_do_not_follow_a_service_into_its_second_life(state: StateDirectory) -> None:
    variables = environment(FERMATA_FAILPOINTS="x:kill", FERMATA_PLANT="bug")
    with system(state, testing=True, environment=variables) as started:
        started.start()
        before = process_of(state, "shard")
        os.kill(before.pid, signal.SIGKILL)
        wait_for(lambda: is_restarted(state, "shard", before))
    first, second = (command_line(state, "shard", life=life)["environment"] for life in (0, 1))
    assert (first.get("FERMATA_FAILPOINTS"), first.get("FERMATA_PLANT")) == ("x:kill", "bug")
    assert (second.get("FERMATA_FAILPOINTS"), second.get("FERMATA_PLANT")) == (None, "bug")


def test_progress_tells_of_every_process(state: StateDirectory) -> None:
    lines: list[str] = []
    with system(state, report=lines) as started:
        started.start()
        before = process_of(state, "shard")
        os.kill(before.pid, signal.SIGKILL)
        wait_for(lambda: is_restarted(state, "shard", before))
    assert lines[0].startswith("valkey-0 is ready on unix:///")
    assert {line.partition(" ")[0] for line in lines[1:4]} == {"shard-0", "orchestrator-0", "tokenizer-0"}
    assert lines[4] == "shard-0 was ended by signal 9; it is started again in 0.2 s"
    assert lines[5].startswith("shard-0 is ready on 127.0.0.1:")


def test_a_state_directory_too_deep_for_a_socket_works_all_the_same(tmp_path: Path) -> None:
    deep = StateDirectory(tmp_path / ("d" * 120))
    with system(deep) as started:
        started.start()
        record = deep.read()
        assert record is not None
        path = Path(record.sockets[0])
        assert len(str(path)) < 108
        assert path.exists()
    assert not path.parent.exists()


def test_there_is_nothing_to_end_where_nothing_ran(state: StateDirectory) -> None:
    assert not take_down(state, print)
    state.lock()
    assert not end_leftovers(state, print)
    state.unlock()
