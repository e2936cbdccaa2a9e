"""The supervisor: one system on one machine, on Ray Serve or as plain processes.

Starts the session store, then either Ray's head and what deploys on it, or all services at once (their addresses are
known beforehand, see `ports`), keeps each running where it was, and ends them in the opposite order. Which programs
there are is `plan`'s and `cluster`'s, how one is kept running `keeper`'s.
"""

from __future__ import annotations

import json
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from services.config import SystemConfig
from services.local import cluster, plan, processes, valkey
from services.local.errors import Interrupted, StartFailed
from services.local.keeper import START_LIMIT, Change, Keeper, Program
from services.local.ports import HeldPort
from services.local.processes import ProcessName
from services.local.state import ProcessRecord, ProcessState, StateDirectory, SystemRecord

STOP_GRACE = 12.0
"""Seconds between SIGTERM and SIGKILL: the 10 that a service takes to drain, and what an exit takes."""
SECOND_THOUGHT = 1.0
"""Seconds after which a further signal means impatience; `make` and a terminal may both pass on the same Ctrl-C."""
_SERVED_INTERVAL = 0.02

Report = Callable[[str], None]


TARGETS = "FERMATA_METRICS_TARGETS"
"""Tells the services in which folder Prometheus looks for them."""


class System:
    """A running system; a context manager whose end ends everything that `start` began.

    Attributes:
        address: the public HOST:PORT; known once `start` has begun.
        log: file for what happens while nobody looks at standard error.
    """

    def __init__(
        self,
        config: SystemConfig,
        *,
        environment: Mapping[str, str],
        report: Report,
        is_served: Callable[[str], bool],
        modules: Mapping[str, str] = plan.MODULES,
    ) -> None:
        """Prepares; starts nothing.

        Args:
            config: settings.
            environment: handed on to the processes.
            report: told each line of progress, from several threads.
            is_served: whether the public address would serve a request now.
            modules: name of each service's Python module.
        """
        self.address = ""
        self._config, self._modules = config, modules
        self._report, self._is_served = report, is_served
        self._state = StateDirectory(config.state_dir)
        self._environment = {TARGETS: str(self._state.path / "targets"), **environment}
        self.log = self._state.log
        self._keepers: list[Keeper] = []
        self._changes: queue.SimpleQueue[Change | None] = queue.SimpleQueue()  # its `put` is safe in signal handlers
        self._interrupted_at: float | None = None
        self._grace = STOP_GRACE
        self._recording = threading.Lock()
        self._record = SystemRecord(supervisor=processes.this_process(), address="")
        self._resources = ExitStack()

    def start(self) -> None:
        """Starts everything; returns when the first request would be served.

        Raises:
            LocalError: what `errors` lists; nothing is left running once the context has ended.
        """
        self._state.lock()
        self._resources.callback(self._state.unlock)
        end_leftovers(self._state, self._report)
        public = self._resources.enter_context(HeldPort(self._config.host, self._config.port))
        self.address = public.address
        self._resources.callback(self._state.forget)
        self._update(replace(self._record, address=self.address))
        redis_url = self._config.redis_url or self._start_store()
        if self._config.local:
            self._start_processes(public.number, redis_url)
        else:
            self._start_cluster(public.number, redis_url)
        self._wait_served()
        with self._recording:
            self._update(replace(self._record, ready=True))

    def interrupt(self) -> None:
        """Ends `start` and `wait`; called again later, makes `stop` do without grace. Safe in a signal handler."""
        if self._interrupted_at is None:
            self._interrupted_at = time.monotonic()
        elif time.monotonic() - self._interrupted_at > SECOND_THOUGHT:
            self._grace = 0.0
            for keeper in self._keepers:
                keeper.hurry()
        self._changes.put(None)

    def wait(self) -> None:
        """Waits for an interrupt."""
        while self._interrupted_at is None:
            self._changes.get()

    def stop(self) -> None:
        """Ends everything, tier by tier, the tokenizers first."""
        for service in reversed(plan.TIERS):
            tier = [keeper for keeper in self._keepers if keeper.program.service == service]
            for keeper in tier:
                self._note(keeper.program, ProcessState.DRAINING)
                keeper.ask_to_stop()
            deadline = time.monotonic() + self._grace
            for keeper in tier:
                keeper.wait_stopped(max(0.0, deadline - time.monotonic()))
        self._keepers.clear()
        self._resources.close()

    def __enter__(self) -> System:
        """Starts nothing yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends everything."""
        self.stop()

    def _start_store(self) -> str:
        """Starts the embedded session store; returns its URL."""
        server = valkey.find_server()
        path = valkey.choose_socket(self._state.path)
        self._resources.callback(valkey.remove_socket, path, self._state.path)
        self._record = replace(self._record, sockets=(str(path),))
        store = plan.store_program(server, path, self._state.store, self._environment)
        self._launch([store])
        return store.address

    def _start_processes(self, public_port: int, redis_url: str) -> None:
        """Starts the services as plain processes."""
        counts = self._config.replica_counts()
        addresses = plan.Addresses(
            public=public_port,
            shards=self._hold(plan.INSIDE_HOST, counts[plan.SHARD]),
            orchestrators=self._hold(plan.INSIDE_HOST, counts[plan.ORCHESTRATOR]),
            tokenizers=self._hold(self._config.host, counts[plan.TOKENIZER]),
            redis_url=redis_url,
        )
        self._launch(plan.service_programs(self._config, addresses, self._environment, self._modules))

    def _start_cluster(self, public_port: int, redis_url: str) -> None:
        """Starts Ray and deploys the services on it."""
        folder = Path(tempfile.mkdtemp(prefix="fermata-ray-"))  # short: it holds Unix sockets with long names
        self._resources.callback(shutil.rmtree, folder, ignore_errors=True)
        self._record = replace(self._record, folder=str(folder))
        self._resources.callback(lambda: processes.end(processes.using(folder), 0.0))
        environment = cluster.environment_of(self._environment, testing=self._config.testing)
        schema = cluster.schema(self._config, public_port, redis_url, self._state.logs, self._environment)
        self._state.schema.write_text(json.dumps(schema, indent=1))
        self._state.directory.unlink(missing_ok=True)
        ports = self._hold(plan.INSIDE_HOST, cluster.HEAD_PORTS)
        self._launch([cluster.head_program(ports, folder, environment)])
        self._launch([cluster.deployer_program(ports[0], self._state.schema, self._state.directory, environment)])

    def _hold(self, host: str, count: int) -> Sequence[int]:
        return [self._resources.enter_context(HeldPort(host)).number for _ in range(count)]

    def _launch(self, programs: Sequence[Program]) -> None:
        """Starts programs at once and waits until all are ready."""
        keepers = [Keeper(item, self._state.log_of(item.service, item.index), self._changed) for item in programs]
        records = [ProcessRecord(item.service, item.index, item.address, ProcessState.STARTING) for item in programs]
        with self._recording:
            self._update(replace(self._record, processes=(*self._record.processes, *records)))
        self._keepers += keepers
        for keeper in keepers:
            keeper.start()
        waited_for = {program.name for program in programs}
        while waited_for:
            change = self._changes.get()
            if self._interrupted_at is not None or change is None:
                raise Interrupted("interrupted while starting")
            if change.failure:
                raise StartFailed(change.failure)
            if change.state is ProcessState.RUNNING:
                waited_for.discard(change.program.name)

    def _wait_served(self) -> None:
        """All are ready for themselves; waits until they have found each other."""
        deadline = time.monotonic() + START_LIMIT
        while not self._is_served(self.address):
            if self._interrupted_at is not None:
                raise Interrupted("interrupted while starting")
            if time.monotonic() > deadline:
                raise StartFailed(f"{self.address} serves no request, see the logs in {self._state.logs}")
            time.sleep(_SERVED_INTERVAL)

    def _changed(self, change: Change) -> None:
        """Keeps the record true; called from the keepers' threads."""
        self._note(change.program, change.state, change.process)
        if change.text:
            self._report(change.text)
        self._changes.put(change)

    def _note(self, program: Program, state: ProcessState, process: ProcessName | None = None) -> None:
        with self._recording:
            self._update(self._record.with_process(program.service, program.index, state, process))

    def _update(self, record: SystemRecord) -> None:
        self._record = record
        self._state.write(record)


def end_leftovers(state: StateDirectory, report: Report) -> bool:
    """Ends what an `up` that was killed left behind; returns whether there was any. The directory must be locked.

    Ends exactly the recorded processes: those whose pid, start time and boot are the same.
    """
    record = state.read()
    if record is None:
        return False
    for service in reversed(plan.TIERS):
        left = [
            item.process
            for item in record.processes
            if item.service == service and item.process is not None and processes.is_running(item.process)
        ]
        for process in left:
            report(f"ending {service} {process.pid}, left behind by an `up` that was killed")
        processes.end(left, STOP_GRACE)
    if record.folder:
        processes.end(processes.using(Path(record.folder)), 0.0)
        shutil.rmtree(record.folder, ignore_errors=True)
    for path in record.sockets:
        valkey.remove_socket(Path(path), state.path)
    state.forget()
    return True


def take_down(state: StateDirectory, report: Report) -> bool:
    """Ends the system of a state directory, whether its `up` still runs or was killed; returns whether there was one.

    Raises:
        StateDirectoryBusy: an `up` began there in this very moment.
    """
    record = state.read()
    if record is None:
        return False
    if processes.is_running(record.supervisor):
        report(f"ending process {record.supervisor.pid}")
        processes.end([record.supervisor], STOP_GRACE * (len(plan.TIERS) + 1))
    state.lock()
    try:
        end_leftovers(state, report)
    finally:
        state.unlock()
    return True
