"""The state directory of one system: who uses it, and what runs from it.

    STATE/lock             locked (flock) by the `up` that runs here, for as long as it lives; holds its pid
    STATE/processes.json   what runs: names of processes that stay true after a reboot, addresses, states
    STATE/logs/            one log per process, appended to
    STATE/store/           data of the embedded session store
    STATE/serve.json       what is deployed on Ray Serve, as `serve run` takes it
    STATE/directory.json   which replicas Serve says are there

The record is replaced as a whole at each change, so that a reader never sees half of one and the next `up` or `down`
can clean up after an `up` that was killed. Knows files only.
"""

from __future__ import annotations

import dataclasses
import enum
import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.local.errors import StateDirectoryBusy
from services.local.processes import ProcessName


class ProcessState(enum.StrEnum):
    """What a process does."""

    STARTING = "STARTING"
    RUNNING = "RUNNING"
    DRAINING = "DRAINING"
    DEAD = "DEAD"


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """One process of a system.

    Attributes:
        service: `tokenizer`, `orchestrator`, `shard` or `valkey`.
        index: its place among the replicas.
        address: where it listens; does not change when it is restarted.
        process: None while it has none.
    """

    service: str
    index: int
    address: str
    state: ProcessState
    process: ProcessName | None = None


@dataclass(frozen=True, slots=True)
class SystemRecord:
    """One system.

    Attributes:
        supervisor: the `up` process.
        address: the public HOST:PORT.
        ready: whether the first request would have been served at some time.
        sockets: paths of Unix sockets, removed when nothing uses them.
        folder: Ray's own files; empty without Ray.
        processes: in the order in which they are needed: first the one that depends on nothing.
    """

    supervisor: ProcessName
    address: str
    ready: bool = False
    sockets: tuple[str, ...] = ()
    folder: str = ""
    processes: tuple[ProcessRecord, ...] = ()

    def with_process(
        self, service: str, index: int, state: ProcessState, process: ProcessName | None = None
    ) -> SystemRecord:
        """The record after a change of one process; without a new name a process that is not DEAD keeps its own."""

        def changed(item: ProcessRecord) -> ProcessRecord:
            if (item.service, item.index) != (service, index):
                return item
            kept = None if state is ProcessState.DEAD else item.process
            return dataclasses.replace(item, state=state, process=process or kept)

        return dataclasses.replace(self, processes=tuple(changed(item) for item in self.processes))

    def to_json(self) -> str:
        """The text of the record."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> SystemRecord:
        """Inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        return cls(
            supervisor=ProcessName(*fields["supervisor"]),
            address=fields["address"],
            ready=fields["ready"],
            sockets=tuple(fields["sockets"]),
            folder=fields["folder"],
            processes=tuple(_process_from(item) for item in fields["processes"]),
        )


class StateDirectory:
    """The files of one system.

    Attributes:
        path: the folder, absolute.
        logs: folder of the logs.
        log: the supervisor's own.
        store: folder of the session store's data.
        schema: what is deployed on Ray Serve.
        directory: which replicas Serve says are there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.logs = self.path / "logs"
        self.log = self.logs / "up.log"
        self.store = self.path / "store"
        self.schema = self.path / "serve.json"
        self.directory = self.path / "directory.json"
        self._record = self.path / "processes.json"
        self._lock_file = self.path / "lock"
        self._lock: int | None = None

    def create(self) -> None:
        """Makes the folders; prompts and outputs are in them, so they are their owner's alone."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        self.store.mkdir(exist_ok=True)

    def lock(self) -> None:
        """Takes the directory for this process, until `unlock` or its end.

        Raises:
            StateDirectoryBusy: another process has it.
        """
        self.create()
        descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode().strip() or "of unknown pid"
            os.close(descriptor)
            raise StateDirectoryBusy(
                f"{self.path} is in use by process {holder}; end it with "
                f"`fermata-server down --state-dir {self.path}` or choose another --state-dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._lock = descriptor

    def unlock(self) -> None:
        """Gives the directory back."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def log_of(self, service: str, index: int) -> Path:
        """The log of one process."""
        return self.logs / f"{service}-{index}.log"

    def read(self) -> SystemRecord | None:
        """What runs, or ran when its `up` was killed; None when all was ended in order."""
        try:
            return SystemRecord.from_json(self._record.read_text())
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):  # torn by a power failure, after which nothing of it runs
            return None

    def write(self, record: SystemRecord) -> None:
        """Replaces the record."""
        fresh = self._record.with_suffix(".new")
        fresh.write_text(record.to_json())
        fresh.replace(self._record)

    def forget(self) -> None:
        """Removes the record: nothing runs any more."""
        self._record.unlink(missing_ok=True)


def _process_from(fields: dict[str, Any]) -> ProcessRecord:
    process = fields.pop("process")
    state = ProcessState(fields.pop("state"))
    return ProcessRecord(**fields, state=state, process=ProcessName(*process) if process else None)
