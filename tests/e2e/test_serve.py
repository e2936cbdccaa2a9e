"""The system on Ray Serve: what is killed is replaced, what is restarted drains, and the reader sees nothing of it.

Two offsets per kind of replica and one rolling restart of each deployment; `make faults` runs more of them
(`FERMATA_FAULT_OFFSETS`).
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from fermata.aio import AsyncClient
from services.local import processes
from services.local.replicas import serve_replicas
from services.local.state import StateDirectory
from tests.e2e.kills import LENGTH, OFFSETS, REQUEST, assert_undisturbed, request_with_stop, seeded_offsets
from tests.e2e.system import UpSystem, is_running, server_command, wait_for
from tests.history import History, check, check_text
from tests.pipeline.house import read, undisturbed

STREAMS = 16 if OFFSETS > 8 else 8
SERVICES = ("tokenizer", "orchestrator", "shard")
RESTARTS = (*["tokenizer"] * 12, *SERVICES) if OFFSETS > 8 else SERVICES
DIRECTORIES = 3 + 2 * 2 + 2 * 1
"""In the process that deploys one for each service; in a tokenizer two, in an orchestrator one."""
METRICS_INTERVAL = 0.5
"""Seconds between two reports of Ray's counters."""

pytestmark = pytest.mark.timeout(120 * OFFSETS)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, random_model_folder: Path) -> Iterator[UpSystem]:
    state = tmp_path_factory.mktemp("serve") / "state"
    replicas = ",".join(f"{service}=2" for service in SERVICES)
    arguments = ("--replicas", replicas, "--model", str(random_model_folder))
    environment = {"RAY_metrics_report_interval_ms": f"{1000 * METRICS_INTERVAL:.0f}"}
    with UpSystem(state, *arguments, local=False, environment=environment) as system:
        yield system


def ray_folder(system: UpSystem) -> Path:
    folder = system.ray_folder()
    assert folder is not None
    return folder


def pid_with_title(system: UpSystem, title: str) -> int:
    found = [item for item in processes.using(ray_folder(system)) if processes.title_of(item).startswith(title)]
    assert len(found) == 1, found
    return found[0].pid


def handle_calls(system: UpSystem) -> dict[str, float]:
    """How many calls each deployment handle of the system has made so far, as Ray counts them."""
    head = system.status()["deployments"]["ray"][0]["pid"]
    found = re.search(r"--metrics-export-port=(\d+)", Path(f"/proc/{head}/cmdline").read_text())
    assert found is not None
    with urlopen(f"http://127.0.0.1:{found[1]}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    counted = re.compile(r"ray_serve_num_router_requests_total\{.*handle=\"(\w+)\".*\} ([\d.]+)")
    return {match[1]: float(match[2]) for line in lines if (match := counted.match(line))}


async def test_ray_carries_no_token(system: UpSystem) -> None:
    """No handle is used but once by each directory, however much is generated; and the services' are all counted."""
    deadline = time.monotonic() + 20
    while len(handle_calls(system)) < DIRECTORIES:  # Ray reports now and then
        assert time.monotonic() < deadline, handle_calls(system)
        await asyncio.sleep(METRICS_INTERVAL)
    await asyncio.sleep(2 * METRICS_INTERVAL)
    before = handle_calls(system)
    assert set(before.values()) == {1.0}
    await asyncio.gather(*(undisturbed(system.address, REQUEST) for _ in range(8)))
    await asyncio.sleep(4 * METRICS_INTERVAL)
    assert handle_calls(system) == before


@pytest.mark.parametrize("kind", SERVICES)
async def test_a_killed_replica(system: UpSystem, kind: str) -> None:
    await assert_undisturbed(system, kind, seeded_offsets(kind)[: max(2, OFFSETS // 4)])


async def test_without_its_controller_it_serves_and_heals(system: UpSystem) -> None:
    pid = pid_with_title(system, "ray::ServeController")
    reference = await undisturbed(system.address, REQUEST)
    os.kill(pid, signal.SIGKILL)
    assert await undisturbed(system.address, REQUEST) == reference
    wait_for(lambda: not is_running(pid), 5, "the kill")
    await assert_undisturbed(system, "tokenizer", [LENGTH // 2])
    assert pid_with_title(system, "ray::ServeController") != pid


async def test_a_rolling_restart_under_load(system: UpSystem) -> None:
    """Every stream is whole and as if nothing had happened, for each service in turn."""
    reference = await undisturbed(system.address, REQUEST)
    done = asyncio.Event()
    finished = 0

    async def keep_reading() -> None:
        nonlocal finished
        async with AsyncClient(system.address) as reader:
            while not done.is_set():
                history = History()
                stream = reader.stream(**REQUEST)
                await read(stream, history, "reader")
                references = {stream.generation_id: reference}
                assert check(history, references) + check_text(history, references) == []
                finished += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(STREAMS):
            group.create_task(keep_reading())
        for service in RESTARTS:
            before = {item["pid"] for item in system.status()["deployments"][service]}
            command = server_command("restart", service, "--state-dir", str(system.state))
            restarted = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
            assert restarted.returncode == 0, restarted.stderr
            after = {item["pid"] for item in system.status()["deployments"][service]}
            assert len(after) == 2
            assert not before & after
        done.set()
    assert finished > STREAMS


def test_status_is_never_behind_the_kernel(system: UpSystem) -> None:
    """Polled five times a second while replicas die and come: who is shown as RUNNING lives."""
    state, looks, done = StateDirectory(str(system.state)), [], threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            asked = time.monotonic()
            replicas = serve_replicas(ray_folder(system), state.directory)
            shown = {item.process.pid: item.state.name for item in replicas if item.process is not None}
            looks.append((asked, shown))

    thread = threading.Thread(target=look)
    thread.start()
    killed: dict[int, float] = {}
    came: dict[int, float] = {}
    for service in SERVICES:
        before = set(system.pids())
        pid = system.kill(service, 0)
        killed[pid] = time.monotonic()
        system.wait_whole()
        came |= dict.fromkeys(set(system.pids()) - before, time.monotonic())
    time.sleep(1)
    done.set()
    thread.join()
    assert len(killed) == len(came) == len(SERVICES)
    for asked, shown in looks:
        assert not [pid for pid, when in killed.items() if asked > when + 1 and pid in shown]
        assert all(shown.get(pid) == "RUNNING" for pid, when in came.items() if asked > when + 1)
    system.kill("shard", 0)
    states = [item["state"] for item in system.status()["deployments"]["shard"]]
    assert states.count("RUNNING") == 1
    system.wait_whole()


async def test_the_head_dies_and_everything_comes_back(system: UpSystem) -> None:
    options, reference = await request_with_stop(system.address)
    history = History()
    async with AsyncClient(system.address) as reader:
        stream = reader.stream(**options | {"durability": "committed"})
        assert not await read(stream, history, "reader", stop_at=20)
        stream.leave()
    for process in processes.using(ray_folder(system)):
        os.kill(process.pid, signal.SIGKILL)
    await asyncio.to_thread(wait_for, lambda: not system.status()["ready"], 10, "the end")
    await asyncio.to_thread(system.wait_whole)
    had: dict[int, list[int]] = {choice: [] for choice in range(3)}
    for record in history.records:
        had[record.choice] += record.token_ids
    async with AsyncClient(system.address) as reader:
        await read(reader.resume(stream.generation_id, token_ids=had), history, "reader")
    references = {stream.generation_id: reference}
    assert check(history, references) + check_text(history, references) == []
