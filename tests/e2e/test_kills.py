"""B4 with real processes and SIGKILL: the reader sees the undisturbed run.

Eight seeded offsets per kind of process. `make faults` runs more of them (`FERMATA_FAULT_OFFSETS`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fermata.aio import AsyncClient
from fermata.events import Tokens
from tests.e2e.kills import KILLS, LENGTH, OFFSETS, REQUEST, assert_undisturbed, request_with_stop, seeded_offsets
from tests.e2e.system import BIN, UpSystem, client
from tests.history import History, check, check_text
from tests.pipeline.house import read

pytestmark = pytest.mark.timeout(60 * OFFSETS)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, random_model_folder: Path) -> Iterator[UpSystem]:
    state, replicas = tmp_path_factory.mktemp("kills") / "state", "tokenizer=2,orchestrator=2,shard=1"
    with UpSystem(state, "--replicas", replicas, "--model", str(random_model_folder)) as system:
        yield system


@pytest.mark.parametrize("kind", KILLS)
async def test_a_killed_service(system: UpSystem, kind: str) -> None:
    await assert_undisturbed(system, kind, seeded_offsets(kind))


def test_a_killed_client_resumes_on_the_command_line(system: UpSystem) -> None:
    command = ["generate", "hello", "--greedy", "--max-tokens", "200"]
    reference = client(*command, server=system.address)
    for offset in seeded_offsets("client"):
        process = subprocess.Popen(
            [str(BIN / "fermata"), *command, "--json", "--server", system.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        generation = process.stderr.readline().split()[1]
        for _ in range(offset):
            process.stdout.readline()
        process.kill()
        process.communicate()
        resumed = client("resume", generation, server=system.address)
        assert (resumed.returncode, resumed.stdout) == (0, reference.stdout), resumed.stderr


async def test_everything_is_killed_and_started_again(tmp_path: Path, random_model_folder: Path) -> None:
    model = ["--model", str(random_model_folder)]
    with UpSystem(tmp_path / "state", *model) as system:
        options, reference = await request_with_stop(system.address)
        history = History()
        async with AsyncClient(system.address) as reader:
            stream = reader.stream(**options | {"durability": "committed"})
            assert not await read(stream, history, "reader", stop_at=20)
            stream.leave()
        generation = stream.generation_id
        for pid in [*system.pids()]:
            os.kill(pid, signal.SIGKILL)
        system.stop(signal.SIGKILL)
    with UpSystem(tmp_path / "state", *model) as system:
        had: dict[int, list[int]] = {choice: [] for choice in range(3)}
        for record in history.records:
            had[record.choice] += record.token_ids
        async with AsyncClient(system.address) as reader:
            await read(reader.resume(generation, token_ids=had), history, "reader")
    references = {generation: reference}
    assert check(history, references) + check_text(history, references) == []


async def test_events_are_spread_over_time(system: UpSystem) -> None:
    """Streaming streams: the first tokens come long before the last ones."""
    loop = asyncio.get_running_loop()
    async with AsyncClient(system.address) as reader:
        stamps = [loop.time() async for event in reader.stream(**REQUEST) if isinstance(event, Tokens)]
    assert len(stamps) > LENGTH / 2
    assert stamps[len(stamps) // 2] - stamps[0] > 0.2 * (stamps[-1] - stamps[0])
