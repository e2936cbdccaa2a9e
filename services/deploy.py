"""Deploys the application on a Ray cluster and keeps a file true that says who is there.

    python -m services.deploy --address HOST:PORT --schema FILE --directory FILE

`schema` is what `serve run` takes; `directory` is written anew at each change. One such process runs beside the head of
a system. Nothing depends on its life: started again it finds the application and goes on watching. SIGHUP deploys what
the file says then; SIGTERM takes the application down, drained. Knows the names of the deployments and nothing of what
they do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from services.app import APPLICATION, DEPLOYMENTS
from services.common import process
from services.replica import CANNOT_START, ReplicaFacts, ServeDirectory

_LOOK_INTERVAL = 0.2
_HEAD_INTERVAL = 1.0
_LEFT_KEPT = 32


def deploy(address: str, schema: Path) -> None:
    """Submits a configuration as anybody can; Serve replaces what differs, one replica after the other.

    Raises:
        subprocess.CalledProcessError: Serve refused it; the reason is on standard error.
    """
    command = [sys.executable, "-P", "-m", "ray.serve.scripts", "run", "--non-blocking", "--address", address]
    subprocess.run([*command, str(schema)], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def wanted_replicas(schema: Path) -> dict[str, int]:
    """The number of replicas of each deployment by a configuration."""
    (application,) = json.loads(schema.read_text())["applications"]
    return {item["name"]: item["num_replicas"] for item in application["deployments"]}


class DeployFailed(Exception):
    """Serve has given up; the text says why."""


def reason_of(application: ApplicationStatusOverview) -> str:
    """Why an application could not be deployed: what the services say, else what Serve says."""
    messages = [application.message, *(item.message for item in application.deployments.values())]
    found = re.findall(rf"^.*?(\w+ {CANNOT_START}: .*)$", "\n".join(messages), re.MULTILINE)
    return "; ".join(dict.fromkeys(found)) or application.message


class Watch:
    """Keeps the file of who is there.

    Attributes:
        complete: set once every deployment has had all of its replicas.
    """

    def __init__(self, file: Path, wanted: Mapping[str, int]) -> None:
        """`wanted` is the number of replicas of each deployment."""
        self.complete = asyncio.Event()
        self._wanted = wanted
        self._file = file
        self._present: Mapping[str, Sequence[ReplicaFacts]] = {}
        self._left: dict[str, list[ReplicaFacts]] = {service: [] for service in DEPLOYMENTS}

    async def run(self) -> None:
        """Watches until cancelled.

        Raises:
            DeployFailed: Serve gave up before every deployment had its replicas.
        """
        while not set(DEPLOYMENTS.values()) <= self._deployed():  # noqa: ASYNC110 - Serve tells nobody
            await asyncio.sleep(_LOOK_INTERVAL)
        directories = {
            service: ServeDirectory(serve.get_deployment_handle(deployment, APPLICATION))
            for service, deployment in DEPLOYMENTS.items()
        }
        while True:
            found = {service: directory.replicas() for service, directory in directories.items()}
            if found != self._present:
                self._write(found)
            if all(len(found[service]) >= self._wanted[name] for service, name in DEPLOYMENTS.items()):
                self.complete.set()
            await asyncio.sleep(_LOOK_INTERVAL)
            if not self.complete.is_set():
                self._deployed()

    def _deployed(self) -> set[str]:
        """The deployments that Serve knows."""
        application = serve.status().applications.get(APPLICATION)
        if application is None:
            return set()
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            raise DeployFailed(reason_of(application))
        return set(application.deployments)

    def _write(self, found: Mapping[str, Sequence[ReplicaFacts]]) -> None:
        """Writes who is present, and who has left in case it still drains."""
        for service, replicas in self._present.items():
            gone = [item for item in replicas if item not in found[service]]
            self._left[service] = [*self._left[service], *gone][-_LEFT_KEPT:]
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps({"present": found, "left": self._left}))
        fresh.replace(self._file)
        self._present = found


async def head_lost(address: str) -> None:
    """Returns when nobody answers at the head's address any more."""
    host, _, port = address.rpartition(":")
    while True:
        await asyncio.sleep(_HEAD_INTERVAL)
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), _HEAD_INTERVAL)
            writer.close()
        except OSError:
            return


async def run(address: str, schema: Path, directory: Path, ready_fd: int) -> int:
    """Deploys unless it is deployed already, watches until SIGTERM or the head is gone; returns the exit status."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    if APPLICATION not in serve.status().applications:
        await asyncio.to_thread(deploy, address, schema)
    again = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, again.set)
    watch = Watch(directory, wanted_replicas(schema))
    watching = asyncio.create_task(watch.run())
    lost, stopped = asyncio.create_task(head_lost(address)), asyncio.create_task(stopping.wait())
    ends = (watching, lost, stopped)
    complete = asyncio.create_task(watch.complete.wait())
    await asyncio.wait((*ends, complete), return_when=asyncio.FIRST_COMPLETED)
    if complete.done():
        process.announce((int(address.rpartition(":")[2]),), ready_fd)
    while not any(task.done() for task in ends):
        hurried = asyncio.create_task(again.wait())
        await asyncio.wait((*ends, hurried), return_when=asyncio.FIRST_COMPLETED)
        if hurried.done():
            again.clear()
            await asyncio.to_thread(deploy, address, schema)
        hurried.cancel()
    if stopped.done():
        await asyncio.to_thread(serve.shutdown)
        return 0
    if lost.done():
        print("the head is gone", file=sys.stderr, flush=True)
        os._exit(1)  # Ray's own way out asks the head, for half a minute
    print(watching.exception(), file=sys.stderr)
    return 1


def main() -> int:
    """Runs from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Deploys the application on a Ray cluster and watches it.")
    parser.add_argument("--address", required=True, help="of the head's GCS, HOST:PORT")
    parser.add_argument("--schema", type=Path, required=True, help="configuration as `serve run` takes it")
    parser.add_argument("--directory", type=Path, required=True, help="file that says who is there")
    parser.add_argument("--ready-fd", type=int, default=-1, help="file descriptor that is told when all is deployed")
    options = parser.parse_args()
    ray.init(address=options.address, namespace="serve", log_to_driver=False, logging_level=logging.ERROR)
    return asyncio.run(run(options.address, options.schema, options.directory, options.ready_fd))


if __name__ == "__main__":
    sys.exit(main())
