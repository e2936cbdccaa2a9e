"""What `status` shows, asked of real servers that play the services."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from fermata.v1 import common_pb2, model_pb2, model_pb2_grpc
from services.local.processes import ProcessName, this_process
from services.local.serving import is_served, served_model
from services.local.state import ProcessRecord, ProcessState, StateDirectory, SystemRecord
from services.local.status import status, table
from services.orchestrator.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from services.shard.v1 import shard_pb2, shard_pb2_grpc

RUNNING = ProcessState.RUNNING
FINGERPRINT = common_pb2.Fingerprint(model="tiny", weights="w", kernels="k", parallel_degree=1, noise_version=1)
"""Its `tokenizer` is not set: JSON shows it all the same."""


class Models(model_pb2_grpc.ModelServiceServicer):
    def __init__(self, model: model_pb2.Model) -> None:
        self._model = model

    def ListModels(self, request: Any, context: Any) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse(models=[self._model])


class Shard(shard_pb2_grpc.ShardServiceServicer):
    def Link(self, request_iterator: Any, context: Any) -> Iterator[shard_pb2.LinkResponse]:
        yield shard_pb2.LinkResponse()
        yield shard_pb2.LinkResponse(load=shard_pb2.Load(running=3, free_blocks=40))
        yield from (shard_pb2.LinkResponse() for request in request_iterator)  # stays until the other side ends it


class Orchestrator(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    def Identify(self, request: Any, context: Any) -> orchestrator_pb2.IdentifyResponse:
        return orchestrator_pb2.IdentifyResponse(stored_tokens=17)


@contextmanager
def serving(add: Any, servicer: Any) -> Iterator[str]:
    """Runs a server and yields its HOST:PORT."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def record(stack: ExitStack) -> SystemRecord:
    model = model_pb2.Model(model="tiny", fingerprint=FINGERPRINT)
    public = stack.enter_context(serving(model_pb2_grpc.add_ModelServiceServicer_to_server, Models(model)))  # type: ignore[abstract]
    shard = stack.enter_context(serving(shard_pb2_grpc.add_ShardServiceServicer_to_server, Shard()))  # type: ignore[abstract]
    add_orchestrator = orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server
    orchestrator = stack.enter_context(serving(add_orchestrator, Orchestrator()))  # type: ignore[abstract]
    me = this_process()
    return SystemRecord(
        supervisor=me,
        address=public,
        ready=True,
        processes=(
            ProcessRecord("shard", 0, shard, RUNNING, me),
            ProcessRecord("orchestrator", 0, orchestrator, RUNNING, me),
            ProcessRecord("tokenizer", 0, public, RUNNING, me),
        ),
    )


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    directory = StateDirectory(tmp_path)
    directory.create()
    return directory


def test_a_system_that_serves(state: StateDirectory, record: SystemRecord) -> None:
    state.write(record)
    description = json.loads(json.dumps(status(state)))
    assert description.keys() == {"ready", "address", "model", "fingerprint", "deployments"}
    assert description["ready"] is True
    assert description["address"] == record.address
    assert description["model"] == "tiny"
    assert description["fingerprint"] == {
        "model": "tiny", "weights": "w", "kernels": "k", "tokenizer": "", "parallel_degree": 1, "noise_version": 1
    }  # fmt: skip
    assert list(description["deployments"]) == ["shard", "orchestrator", "tokenizer"]
    for item in record.processes:
        (shown,) = description["deployments"][item.service]
        assert shown.keys() == {"pid", "node", "address", "state", "load"}
        assert (shown["pid"], shown["node"]) == (os.getpid(), os.uname().nodename)
        assert (shown["address"], shown["state"]) == (item.address, "RUNNING")
        assert shown["load"]["memory_bytes"] > 1 << 20
    assert description["deployments"]["shard"][0]["load"]["running"] == 3
    assert description["deployments"]["shard"][0]["load"]["free_blocks"] == 40
    assert description["deployments"]["orchestrator"][0]["load"]["stored_tokens"] == 17
    lines = table(description).splitlines()
    assert lines[0] == f"ready  grpc://{record.address}  tiny"
    assert [line.split()[:3] for line in lines[1:]] == [
        [item.service, str(os.getpid()), "RUNNING"] for item in record.processes
    ]
    assert re.search(r" cpu \d+\.\d s  memory \d+ MiB  running 3  free_blocks 40$", lines[1])


def changed(record: SystemRecord, **changes: Any) -> SystemRecord:
    return dataclasses.replace(record, **changes)


def test_not_ready_while_one_service_has_no_process(state: StateDirectory, record: SystemRecord) -> None:
    gone = this_process()._replace(boot_id="before the last boot")
    for broken in (
        record.with_process("shard", 0, ProcessState.STARTING),
        record.with_process("shard", 0, ProcessState.DEAD),
        record.with_process("shard", 0, RUNNING, gone),
        changed(record, ready=False),
        changed(record, supervisor=gone),
        changed(record, address="127.0.0.1:1"),
    ):
        state.write(broken)
        assert not status(state)["ready"]
    one_of_two = (*record.processes, ProcessRecord("shard", 1, "127.0.0.1:1", ProcessState.DEAD))
    state.write(changed(record, processes=one_of_two))
    assert status(state)["ready"], "the other shard serves"


def test_a_process_that_is_gone_is_dead_whatever_the_record_says(state: StateDirectory, record: SystemRecord) -> None:
    gone = ProcessName(this_process().pid, 1, "boot")
    state.write(record.with_process("shard", 0, RUNNING, gone))
    (shown,) = status(state)["deployments"]["shard"]
    assert (shown["pid"], shown["state"], shown["load"]) == (None, "DEAD", None)


def test_a_service_that_does_not_answer_has_its_process_s_load(state: StateDirectory, record: SystemRecord) -> None:
    shards = (ProcessRecord("shard", 0, "127.0.0.1:1", RUNNING, this_process()),)
    state.write(changed(record, processes=shards))
    assert status(state)["deployments"]["shard"][0]["load"].keys() == {"cpu_seconds", "memory_bytes"}


def test_where_nothing_runs(state: StateDirectory) -> None:
    description = status(state)
    assert description == {"ready": False, "address": None, "model": None, "fingerprint": None, "deployments": {}}
    assert table(description) == "nothing runs"


def test_served_once_a_shard_is_known(stack: ExitStack) -> None:
    add = model_pb2_grpc.add_ModelServiceServicer_to_server
    unknown = stack.enter_context(serving(add, Models(model_pb2.Model(model="tiny"))))  # type: ignore[abstract]
    assert served_model(unknown) == model_pb2.Model(model="tiny")
    assert not is_served(unknown)
    known = stack.enter_context(serving(add, Models(model_pb2.Model(fingerprint=FINGERPRINT))))  # type: ignore[abstract]
    assert is_served(known)
    assert is_served(known.replace("127.0.0.1", "0.0.0.0"))
    assert not is_served("127.0.0.1:1")
