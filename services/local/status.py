"""What runs in a state directory, as `fermata-server status` shows it.

Joins three sources: the record of `up`, the kernel (does this very process run, what has it used), and the processes
themselves (the public `ModelService`, an orchestrator's `Identify`, the `Load` that a shard sends with its heartbeats).
Changes nothing.
"""

from __future__ import annotations

import queue
import socket
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from services.local import plan, processes
from services.local.replicas import serve_replicas
from services.local.serving import served_model
from services.local.state import ProcessRecord, ProcessState, StateDirectory, SystemRecord
from services.orchestrator.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from services.shard.v1 import shard_pb2, shard_pb2_grpc

_ASK_SECONDS = 1.5  # a shard tells its load with every heartbeat, once a second


def status(state: StateDirectory) -> dict[str, Any]:
    """Describes a system in JSON types.

    Returns:
        `ready`, `address`, `model`, `fingerprint` (null while unknown) and `deployments`: per service a list of
        {`pid`, `node`, `address`, `state`, `load`}. `load` holds `cpu_seconds` and `memory_bytes` of the process and
        the counters that its service tells; null when the process is gone.
    """
    record = state.read()
    if record is None:
        return {"ready": False, "address": None, "model": None, "fingerprint": None, "deployments": {}}
    items = [*record.processes, *(serve_replicas(Path(record.folder), state.directory) if record.folder else ())]
    with ThreadPoolExecutor(max_workers=len(items) + 1) as pool:
        model = pool.submit(served_model, record.address)
        described = list(pool.map(_describe, items))
    served = model.result()
    deployments: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item, description in zip(items, described, strict=True):
        deployments[item.service].append(description)
    fingerprint = served.fingerprint if served is not None and served.HasField("fingerprint") else None
    return {
        "ready": fingerprint is not None and _is_whole(record, deployments),
        "address": record.address,
        "model": served.model if served is not None else None,
        "fingerprint": _json(fingerprint) if fingerprint is not None else None,
        "deployments": deployments,
    }


def table(description: dict[str, Any]) -> str:
    """The same for people."""
    if description["address"] is None:
        return "nothing runs"
    head = "ready" if description["ready"] else "not ready"
    lines = [f"{head}  grpc://{description['address']}  {description['model'] or ''}".rstrip()]
    for service, replicas in description["deployments"].items():
        for item in replicas:
            place = f"{service:<13}{item['pid'] or '-':>8}  {item['state']:<9} {item['address']:<22}"
            lines.append(f"{place} {_summary(item['load'] or {})}".rstrip())
    return "\n".join(lines)


def _summary(load: dict[str, Any]) -> str:
    """CPU time, memory, and the counters that have begun to count."""
    if not load:
        return ""
    counters = {name: value for name, value in load.items() if name not in ("cpu_seconds", "memory_bytes") and value}
    parts = [f"cpu {load['cpu_seconds']:.1f} s", f"memory {load['memory_bytes'] / (1 << 20):.0f} MiB"]
    return "  ".join([*parts, *(f"{name} {value}" for name, value in counters.items())])


def _is_whole(record: SystemRecord, deployments: dict[str, list[dict[str, Any]]]) -> bool:
    """Whether `up` came to its end and each service has a process that works."""
    return (
        record.ready
        and processes.is_running(record.supervisor)
        and all(any(item["state"] == ProcessState.RUNNING for item in replicas) for replicas in deployments.values())
    )


def _describe(item: ProcessRecord) -> dict[str, Any]:
    usage = processes.usage_of(item.process) if item.process is not None else None
    load: dict[str, Any] | None = None
    if usage is not None:
        load = {"cpu_seconds": usage.cpu_seconds, "memory_bytes": usage.memory_bytes}
        ask = _COUNTERS.get(item.service)
        if ask is not None and item.state is ProcessState.RUNNING:
            load |= _asked(ask, item.address)
    return {
        "pid": item.process.pid if item.process is not None and usage is not None else None,
        "node": socket.gethostname(),
        "address": item.address,
        "state": str(item.state if usage is not None else ProcessState.DEAD),
        "load": load,
    }


def _asked(ask: Callable[[grpc.Channel], dict[str, Any]], address: str) -> dict[str, Any]:
    """What a service tells of itself; nothing when it does not answer."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            return ask(channel)
        except grpc.RpcError:
            return {}


def _orchestrator_counters(channel: grpc.Channel) -> dict[str, Any]:
    answer = orchestrator_pb2_grpc.OrchestratorServiceStub(channel).Identify(
        orchestrator_pb2.IdentifyRequest(), timeout=_ASK_SECONDS
    )
    return {name: getattr(answer, name) for name in ("store_calls", "store_flushes", "stored_tokens", "wasted_tokens")}


def _shard_counters(channel: grpc.Channel) -> dict[str, Any]:
    """Opens a link that admits nothing, and waits for the first heartbeat."""
    commands: queue.SimpleQueue[shard_pb2.LinkRequest | None] = queue.SimpleQueue()
    responses = shard_pb2_grpc.ShardServiceStub(channel).Link(iter(commands.get, None), timeout=_ASK_SECONDS)
    try:
        for response in responses:
            if response.HasField("load"):
                return {field.name: getattr(response.load, field.name) for field in response.load.DESCRIPTOR.fields}
        return {}
    finally:
        responses.cancel()
        commands.put(None)  # ends the thread that sends


_COUNTERS: dict[str, Callable[[grpc.Channel], dict[str, Any]]] = {
    plan.SHARD: _shard_counters,
    plan.ORCHESTRATOR: _orchestrator_counters,
}


def _json(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
