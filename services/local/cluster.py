"""The plan of a system on Ray Serve on one machine: a head of its own, and a process that deploys and watches.

Decides and starts nothing. The head has its own ports, folder and token, so that systems on one machine do not meet.
Knows Ray by its commands and its environment only; what is deployed is `services.app`'s.
"""

from __future__ import annotations

import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services.config import OrchestratorConfig, ShardConfig, SystemConfig, TokenizerConfig, load
from services.local.keeper import Probe, Program, ReadyPipe
from services.local.plan import DEPLOYER, HEAD, INSIDE_HOST, ORCHESTRATOR, SHARD, TOKENIZER, child_environments

DEPLOYMENTS = {SHARD: "Shard", ORCHESTRATOR: "Orchestrator", TOKENIZER: "Tokenizer"}
HEAD_PORTS = 3
"""Ports of the head: its own, that of Ray's client, which is in use for nothing, and that of its metrics."""
_SELDOM = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    "RAY_event_stats": "0",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "10000",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_task_events_report_interval_ms": "0",
}
"""What Ray does ten times per second by default, for clusters whose actors come and go: together it takes a tenth of a
core for nothing here."""
_LOGICAL_CPUS = 1000
"""Ray counts these and uses none of them: replicas are placed by hand on one machine."""
_OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes; no object of ours is ever in it
_DISCOVERED = ("port", "ready_fd", "shards", "orchestrators", "endpoints")
"""Settings that only plain processes are told."""


def environment_of(environment: Mapping[str, str], *, testing: bool) -> dict[str, str]:
    """The environment of everything that belongs to one cluster."""
    _, inherited = child_environments(environment, testing=testing)
    return {
        **_SELDOM,
        **{name: value for name, value in inherited.items() if name != "RAY_ADDRESS"},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # the deployer drains before
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # else Ray's own processes go before those that generate
    }


def head_program(ports: Sequence[int], folder: Path, environment: Mapping[str, str]) -> Program:
    """Ray's head: it ends with the process that is started here, and all of Ray's with it.

    Args:
        ports: `HEAD_PORTS` of them, free ones.
        folder: for Ray's sockets and logs.
        environment: of everything that belongs to this cluster.
    """
    port, client_port, metrics_port = ports
    options = {
        "port": port,
        "ray-client-server-port": client_port,
        "metrics-export-port": metrics_port,
        "node-ip-address": INSIDE_HOST,
        "num-cpus": _LOGICAL_CPUS,
        "object-store-memory": _OBJECT_STORE_BYTES,
        "temp-dir": folder,
        "include-dashboard": "false",
        "include-log-monitor": "false",
    }
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block", "--no-monitor"]
    return Program(
        service=HEAD,
        index=0,
        address=f"{INSIDE_HOST}:{port}",
        command=[*command, "--disable-usage-stats", *(f"--{name}={value}" for name, value in options.items())],
        environment=environment,
        restart_environment=environment,
        readiness=lambda: Probe(lambda: _listens(port)),
    )


def deployer_program(port: int, schema: Path, directory: Path, environment: Mapping[str, str]) -> Program:
    """The process that deploys and watches."""
    address = f"{INSIDE_HOST}:{port}"
    options = [f"--address={address}", f"--schema={schema}", f"--directory={directory}"]
    return Program(
        service=DEPLOYER,
        index=0,
        address=address,
        command=[sys.executable, "-P", "-m", "services.deploy", *options],
        environment=environment,
        restart_environment=environment,
        readiness=lambda: ReadyPipe(str(port)),
    )


def schema(
    config: SystemConfig, public_port: int, redis_url: str, logs: Path, environment: Mapping[str, str]
) -> dict[str, Any]:
    """The configuration of Serve, as `serve run` takes it.

    Raises:
        SystemExit: a setting of a service does not parse.
    """
    told: dict[str, Any] = {"model": config.model, "testing": config.testing}
    compute = {name: getattr(config, name) for name in ("threads", "dtype", "device", "kernels")}
    services: dict[str, tuple[Any, dict[str, Any]]] = {
        SHARD: (ShardConfig, {"host": INSIDE_HOST, **compute}),
        ORCHESTRATOR: (OrchestratorConfig, {"host": INSIDE_HOST, "redis_url": redis_url}),
        TOKENIZER: (TokenizerConfig, {"host": config.host, "public_port": public_port}),
    }
    arguments = {
        service: {**_chosen(load(kind, [], environment=environment)[0]), **told, **own}
        for service, (kind, own) in services.items()
    }
    counts = config.replica_counts()
    return {
        "proxy_location": "Disabled",
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": "fermata",
                "import_path": "services.app:application",
                "route_prefix": None,
                "args": {**arguments, "logs": str(logs)},
                "deployments": [
                    {"name": name, "num_replicas": counts[service]} for service, name in DEPLOYMENTS.items()
                ],
            }
        ],
    }


def _chosen(config: Any) -> dict[str, Any]:
    """Settings as a file can hold them."""
    values = {name: value for name, value in asdict(config).items() if name not in _DISCOVERED}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _listens(port: int) -> bool:
    try:
        with socket.create_connection((INSIDE_HOST, port), timeout=0.5):
            return True
    except OSError:
        return False
