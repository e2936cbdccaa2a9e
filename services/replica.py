"""A Serve deployment that hosts one service, and the directory that Serve keeps of its replicas.

A replica runs the service's own gRPC server on the event loop that Serve gives it; Serve places it, watches it, ends it
and tells the others where it is. Nothing of a request passes through here. Knows no service but by the name of its
package.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from services.common import failpoints, logs, process
from services.common.directory import PublishedDirectory, publish
from services.config import ServiceConfig, process_environment

log = logging.getLogger(__name__)

CANNOT_START = "cannot start"
"""Stands before the reason in what Serve is told of a service that cannot start."""
ReplicaFacts = Mapping[str, Any]
"""What a replica tells the others of itself: `address`, `pid`, `node`."""


class DirectoryRouter(RequestRouter):
    """Takes note of the replicas that Serve pushes to every process with a handle; routes nothing.

    Serve keeps one per deployment and process and feeds it by long poll, so a directory costs no call.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replaces what is known; called on Serve's own thread."""
        super().update_replicas(replicas)
        facts = [replica.replica_metadata for replica in replicas]
        publish(self._deployment_id.name, facts)  # a function of another module: Serve sends this class by value

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Any will do: it is asked once per directory, to wake Serve's push."""
        return [candidate_replicas]


class ServeDirectory(PublishedDirectory):
    """The replicas of a deployment that can be dialled now, as Serve pushes them.

    A dead one is in it until Serve's next health check, a second later at most; who dials finds out by itself.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        """Begins to listen; needs a running event loop."""
        super().__init__(handle.deployment_id.name)
        self._waking = asyncio.create_task(self._wake(handle), name=f"directory of {self._name}")

    def close(self) -> None:
        """Waits for nobody any more."""
        self._waking.cancel()

    async def _wake(self, handle: DeploymentHandle[Any]) -> None:
        """A handle listens from its first use on."""
        try:
            async with handle.choose_replica():
                log.debug("directory of %s: awake", self._name)
        except Exception:
            log.exception("directory of %s: nothing will be pushed", self._name)


class ReplicaHost:
    """What a service in a replica lives in.

    Attributes:
        serving: what the service told when it was ready.
    """

    def __init__(self) -> None:
        self.serving: asyncio.Future[process.Serving] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()

    def ready(self, serving: process.Serving) -> None:
        """The service serves."""
        self.serving.set_result(serving)

    async def stopping(self) -> None:
        """Waits for `stop`."""
        await self._stop.wait()

    def stop(self) -> None:
        """The service shall stop."""
        self._stop.set()


class Replica:
    """The callable of all deployments."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, service: str, config: ServiceConfig, log_folder: str = "", **peers: DeploymentHandle[Any]
    ) -> None:
        """Returns when the service serves.

        Args:
            service: its package under `services`.
            config: its settings; an empty host becomes the node's address.
            log_folder: for its log; empty leaves it to Ray.
            peers: deployments whose directories the service is given, by the names of its parameters.

        Raises:
            RuntimeError: the service cannot start; the text says why.
        """
        context = serve.get_replica_context()
        self._host = config.host or _node_address()
        log_file = Path(log_folder) / f"{service}-{os.getpid()}.log" if log_folder else None
        logs.configure_logging(service, file=log_file, json=config.log_format == "json")
        failpoints.configure(process_environment(), testing=config.testing)
        if "tokenizers" not in peers and service == "tokenizer":
            peers["tokenizers"] = serve.get_deployment_handle(context.deployment, context.app_name)
        self._directories = {name: ServeDirectory(handle) for name, handle in peers.items()}
        self._hosting = ReplicaHost()
        package = importlib.import_module(f"services.{service}.serving")
        settings = replace(config, host=self._host)
        self._service = asyncio.create_task(package.serve(settings, self._hosting, **self._directories), name=service)
        await asyncio.wait((self._service, self._hosting.serving), return_when=asyncio.FIRST_COMPLETED)
        if self._service.done():
            error = self._service.exception()
            log.error("%s", error)
            raise RuntimeError(f"{service} {CANNOT_START}: {error}") from error

    def check_health(self) -> None:
        """Called by Serve each second.

        Raises:
            RuntimeError: the service has ended by itself.
        """
        if self._service.done():
            raise RuntimeError("the service has ended") from self._service.exception()

    def record_replica_metadata(self) -> ReplicaFacts:
        """What the others are told once: where to dial, and which process this is."""
        port = self._hosting.serving.result().ports[-1]
        return {"address": f"{self._host}:{port}", "pid": os.getpid(), "node": _node_address()}

    def record_autoscaling_stats(self) -> Mapping[str, float]:
        """How busy the service is, for an autoscaling policy."""
        return self._hosting.serving.result().load()

    async def __del__(self) -> None:
        """Drains; Serve has taken the replica out of all directories before."""
        self._hosting.stop()
        await asyncio.wait((self._service,))
        for directory in self._directories.values():
            directory.close()


def _node_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
