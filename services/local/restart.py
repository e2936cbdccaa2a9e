"""Replaces the processes of one service by fresh ones while the system serves: one after the other, each drained.

On Ray Serve the deployer is told to deploy anew with a mark on this one deployment, which Serve takes for a change; a
plain process is ended and its supervisor starts it again. Waits until the last of the old ones has gone.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from services.local import plan, processes
from services.local.cluster import DEPLOYMENTS
from services.local.errors import NothingRuns, RestartFailed
from services.local.processes import ProcessName
from services.local.replicas import serve_replicas
from services.local.state import ProcessRecord, ProcessState, StateDirectory, SystemRecord

LIMIT = 300.0
_INTERVAL = 0.1
_GRACE = 12.0


def restart(state: StateDirectory, service: str) -> int:
    """Restarts all replicas of a service; returns how many.

    Raises:
        NothingRuns: no `up` runs in the state directory.
        RestartFailed: not all were replaced in time.
    """
    record = state.read()
    if record is None or not processes.is_running(record.supervisor):
        raise NothingRuns(f"nothing runs in {state.path}")
    old = [item.process for item in _replicas(state, service) if item.process is not None]
    if record.folder:
        _mark(state.schema, service)
        _hurry_deployer(record)
        _wait_replaced(state, service, old)
    else:
        for process in old:
            processes.end([process], _GRACE)
            _wait_replaced(state, service, [process])
    return len(old)


def _replicas(state: StateDirectory, service: str) -> Sequence[ProcessRecord]:
    """The replicas of a service now."""
    record = state.read()
    if record is None:
        return ()
    items = serve_replicas(Path(record.folder), state.directory) if record.folder else record.processes
    return [item for item in items if item.service == service]


def _mark(schema: Path, service: str) -> None:
    """Changes what Serve compares: an environment variable of the deployment's replicas."""
    content = json.loads(schema.read_text())
    for item in content["applications"][0]["deployments"]:
        if item["name"] == DEPLOYMENTS[service]:
            options = item.setdefault("ray_actor_options", {"num_cpus": 0.1})
            options["runtime_env"] = {"env_vars": {"FERMATA_RESTARTED": str(time.time_ns())}}
    fresh = schema.with_suffix(".new")
    fresh.write_text(json.dumps(content, indent=1))
    fresh.replace(schema)


def _hurry_deployer(record: SystemRecord) -> None:
    deployer = next(item.process for item in record.processes if item.service == plan.DEPLOYER)
    if deployer is None:
        raise RestartFailed("the process that deploys is just being started again; retry")
    os.kill(deployer.pid, signal.SIGHUP)


def _wait_replaced(state: StateDirectory, service: str, old: Sequence[ProcessName]) -> None:
    """Waits until none of the old ones is there and as many new ones serve."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        now = _replicas(state, service)
        fresh = [item for item in now if item.state is ProcessState.RUNNING and item.process not in old]
        if not any(processes.is_running(process) for process in old) and len(fresh) >= len(old):
            return
        time.sleep(_INTERVAL)
    raise RestartFailed(f"not all of {service} were replaced within {LIMIT:.0f} s")
