"""How a system on Ray Serve begins and ends: what is killed leaves nothing behind, and what runs beside it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml

from services.local import cluster, processes
from services.local.ports import HeldPort
from services.local.processes import ProcessName
from tests.e2e.system import UpSystem, client, server_command, wait_for
from tests.valkey import start_valkey

INFRA = Path(__file__).resolve().parents[2] / "infra"
GENERATE = ("generate", "hello", "--greedy", "--max-tokens", "5")

pytestmark = pytest.mark.timeout(240)


def ray_processes(system: UpSystem) -> list[ProcessName]:
    return processes.using(ray_folder(system))


def ray_folder(system: UpSystem) -> Path:
    folder = system.ray_folder()
    assert folder is not None
    return folder


def assert_nothing_is_left(found: list[ProcessName], folder: Path) -> None:
    wait_for(lambda: not any(processes.is_running(item) for item in found), 15, "the end of all processes")
    assert processes.using(folder) == []
    assert not folder.exists()


def pids_of(system: UpSystem, *services: str) -> list[int]:
    deployments = system.status()["deployments"]
    return [item["pid"] for service in services for item in deployments[service]]


def test_two_systems_and_the_end_of_one(tmp_path: Path) -> None:
    """An interrupt leaves nothing of one system and everything of the other; a killed deployer takes nothing along."""
    one, other = (UpSystem(tmp_path / name / "state", local=False) for name in ("one", "other"))
    with one:
        with other:
            assert ray_folder(one) != ray_folder(other)
            folder, found = ray_folder(other), ray_processes(other)
            assert len(found) >= 6
            first = client(*GENERATE, server=other.address)
            assert first.returncode == 0, first.stderr
        assert other.process is not None
        assert other.process.returncode == 0
        assert_nothing_is_left(found, folder)
        services = pids_of(one, "tokenizer", "orchestrator", "shard")
        (deployer,) = pids_of(one, "serve")
        os.kill(deployer, signal.SIGKILL)
        assert client(*GENERATE, server=one.address).stdout == first.stdout
        wait_for(lambda: pids_of(one, "serve") not in ([deployer], [None]), 15, "a new deployer")
        one.wait_whole()
        assert pids_of(one, "tokenizer", "orchestrator", "shard") == services
        folder, found = ray_folder(one), ray_processes(one)
    assert_nothing_is_left(found, folder)


def test_a_killed_supervisor_takes_nothing_along_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    system = UpSystem(tmp_path / "state", local=False)
    system.start()
    first = client(*GENERATE, server=system.address)
    generation = first.stderr.split()[1]
    folder, found = ray_folder(system), ray_processes(system)
    system.stop(signal.SIGKILL)
    assert client(*GENERATE, server=system.address).stdout == first.stdout
    assert all(processes.is_running(item) for item in found)
    with system:
        assert_nothing_is_left(found, folder)
        again = client("resume", generation, server=system.address)
        assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
        folder, found = ray_folder(system), ray_processes(system)
    assert_nothing_is_left(found, folder)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    command = server_command("up", "--port", "0", "--state-dir", str(tmp_path), "--model", "/no/such/folder")
    failed = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert failed.returncode == 1
    assert "shard cannot start: model: no folder /no/such/folder" in failed.stderr
    assert "Traceback" not in failed.stderr


@contextmanager
def ray_head(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head such as anybody has; yields its address and the environment that its users need."""
    with ExitStack() as stack:
        ports = [stack.enter_context(HeldPort("127.0.0.1")).number for _ in range(cluster.HEAD_PORTS)]
        environment = cluster.environment_of(os.environ, testing=False)
        program = cluster.head_program(ports, folder, environment)
        head = subprocess.Popen(program.command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            readiness = program.readiness()
            assert readiness.wait(head, 60)
            yield program.address, environment
        finally:
            head.terminate()
            head.wait(30)
            processes.end(processes.using(folder), 0.0)


def test_the_configuration_file_is_served(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """`serve run` of the file in `infra`, with free ports, on a Ray cluster of one's own."""
    configuration = yaml.safe_load((INFRA / "serve.yaml").read_text())
    arguments = configuration["applications"][0]["args"]
    with HeldPort("127.0.0.1") as public, ExitStack() as stack:
        store = start_valkey(tmp_path)
        stack.callback(store.stop)
        arguments["tokenizer"]["public_port"] = public.number
        arguments["orchestrator"]["redis_url"] = store.url
        file = tmp_path / "serve.yaml"
        file.write_text(yaml.safe_dump(configuration))
        folder = tmp_path_factory.mktemp("ray")
        with ray_head(folder) as (address, environment):
            command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", address, str(file)]
            with (tmp_path / "serve.log").open("wb") as log:
                run = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            assert wait_for(lambda: _generated(public.address), 60, f"a service ({tmp_path / 'serve.log'})").stdout
            run.send_signal(signal.SIGINT)
            assert run.wait(30) == 0
            wait_for(lambda: client(*GENERATE, server=public.address).returncode, 10, "the end of the service")


def _generated(address: str) -> subprocess.CompletedProcess[str] | None:
    """What was generated, if it was."""
    result = client(*GENERATE, server=address)
    return result if result.returncode == 0 else None
