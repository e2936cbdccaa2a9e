"""The session store against a model of one session in a page of Python: random histories of two owners (R10, R12)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import SessionBusy, SessionChanged
from services.common.types import FinishReason
from services.orchestrator.session_records import BranchPoint, Claimed, Refused, Result, ResultKind, Terminal
from services.orchestrator.sessions import SessionStore
from tests.unit.orchestrator.store_helpers import TENANT, Run, begin, open_stores
from tests.valkey import Valkey

OWNERS = ("one", "two")
CHOICES = 2
small = st.integers(0, 2)
commands = st.one_of(
    st.tuples(st.just("open"), st.sampled_from(OWNERS), st.integers(-1, 1), st.none() | st.booleans()),
    st.tuples(
        st.just("append"),
        st.sampled_from(OWNERS),
        st.integers(0, 3),
        st.integers(0, CHOICES - 1),
        st.integers(-3, 1),
        st.lists(st.integers(0, 1), max_size=4),
    ),
    st.tuples(
        st.just("finish"), st.sampled_from(OWNERS), st.integers(0, 3), st.integers(0, CHOICES - 1), st.integers(-1, 1)
    ),
    st.tuples(st.just("park"), st.sampled_from(OWNERS), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("claim"), st.sampled_from(OWNERS), st.integers(0, 3), st.sampled_from(OWNERS)),
)


@dataclass
class Log:
    """One generation: its logs and terminals by choice."""

    name: str
    ids: list[list[int]] = field(default_factory=lambda: [[] for _ in range(CHOICES)])
    terminals: dict[int, Terminal] = field(default_factory=dict)


class Model:
    """What the rules say, for one session."""

    def __init__(self) -> None:
        self.logs: list[Log] = []
        self.owner, self.epoch = "", 0
        self.state, self.active = "idle", -1

    def open(self, owner: str, name: str, expected: int) -> type[Exception] | None:
        if self.state == "running":
            return SessionBusy
        if expected != len(self.logs):
            return SessionChanged
        if self.state == "parked":
            parked = self.logs[self.active]
            for choice, ids in enumerate(parked.ids):
                parked.terminals.setdefault(choice, Terminal(choice, FinishReason.CANCELLED, len(ids)))
        self.logs.append(Log(name))
        self.owner, self.state, self.active = owner, "running", len(self.logs) - 1
        return None

    def append(self, owner: str, index: int, choice: int, first: int, ids: list[int]) -> Result:
        if owner != self.owner:
            return self._fenced()
        log = self.logs[index]
        stored = log.ids[choice]
        if first > len(stored):
            return Result(ResultKind.CONFLICT, count=len(stored))
        known = stored[first : first + len(ids)]
        if known != ids[: len(known)]:
            return Result(ResultKind.DIVERGED, count=len(stored))
        if len(known) == len(ids):
            return Result(ResultKind.DUPLICATE)
        if choice in log.terminals:
            return Result(ResultKind.FINISHED, terminal=log.terminals[choice])
        stored += ids[len(known) :]
        return Result(ResultKind.OK)

    def finish(self, owner: str, index: int, terminal: Terminal) -> Result:
        if owner != self.owner:
            return self._fenced()
        log = self.logs[index]
        if (stored := log.terminals.get(terminal.choice)) is not None:
            return Result(ResultKind.DUPLICATE) if stored == terminal else Result(ResultKind.FINISHED, terminal=stored)
        if terminal.count != len(log.ids[terminal.choice]):
            return Result(ResultKind.CONFLICT, count=len(log.ids[terminal.choice]))
        log.terminals[terminal.choice] = terminal
        if len(log.terminals) == CHOICES:
            self.state, self.active = "idle", -1
        return Result(ResultKind.OK)

    def park(self, owner: str, index: int, epoch: int) -> Result:
        if owner != self.owner:
            return self._fenced()
        if index != self.active:
            return Result(ResultKind.FINISHED, terminal=self.logs[index].terminals[0])
        if epoch != self.epoch:
            return self._fenced()
        before, self.state = self.state, "parked"
        return Result(ResultKind.DUPLICATE if before == "parked" else ResultKind.OK)

    def claim(self, owner: str, index: int, expected: str) -> Refused | None:
        if index != self.active:
            return Refused(self.owner, f"{self.owner}:1", finished=True)
        if self.owner not in (expected, owner):
            return Refused(self.owner, f"{self.owner}:1", finished=False)
        self.owner, self.state = owner, "running"
        return None

    def _fenced(self) -> Result:
        return Result(ResultKind.FENCED, epoch=self.epoch, owner=self.owner)


class History:
    """Runs commands on the store and on the model, and compares."""

    def __init__(self, stores: list[SessionStore]) -> None:
        self.stores = dict(zip(OWNERS, stores, strict=True))
        self.model = Model()
        self.runs: list[Run] = []

    async def start(self) -> None:
        run = await begin(self.stores["one"], choices=CHOICES)
        assert self.model.open("one", run.generation, 0) is None
        self._opened(run)

    async def open(self, owner: str, wrong_count: int, continued: bool | None) -> None:
        count = len(self.runs) + wrong_count
        parent = BranchPoint() if continued is None else BranchPoint(self.runs[-1].generation, int(continued), 0)
        fields = {"choices": CHOICES, "parent": parent, "expected_generation_count": count}
        refused = self.model.open(owner, "", count)
        try:
            run = await begin(self.stores[owner], self.runs[0].session, **fields)
        except (SessionBusy, SessionChanged) as error:
            assert type(error) is refused
        else:
            assert refused is None
            self._opened(run)

    async def append(self, owner: str, index: int, choice: int, offset: int, ids: list[int]) -> None:
        index = min(index, len(self.runs) - 1)
        first = max(0, len(self.model.logs[index].ids[choice]) + offset)
        result = await self._seen(owner, index).append(first, ids, choice)
        assert result == self.model.append(owner, index, choice, first, ids)

    async def finish(self, owner: str, index: int, choice: int, offset: int) -> None:
        index = min(index, len(self.runs) - 1)
        count = max(0, len(self.model.logs[index].ids[choice]) + offset)
        terminal = Terminal(choice, FinishReason.CANCELLED, count)
        run = self._seen(owner, index)
        assert await run.write(run.finish_with(terminal)) == self.model.finish(owner, index, terminal)

    async def park(self, owner: str, index: int, late: bool) -> None:
        index = min(index, len(self.runs) - 1)
        run = self._seen(owner, index)
        run.epoch -= late
        assert await run.park() == self.model.park(owner, index, run.epoch)

    async def claim(self, owner: str, index: int, expected: str) -> None:
        index = min(index, len(self.runs) - 1)
        run = self.runs[index]
        answer = await self.stores[owner].claim(TENANT, run.session, run.generation, expected_owner=expected)
        refused = self.model.claim(owner, index, expected)
        if isinstance(answer, Claimed):
            assert refused is None and answer.epoch > self.model.epoch
            self.model.epoch = answer.epoch
        else:
            assert answer == refused

    async def compare(self) -> None:
        """Everything that is stored is what the model has."""
        store, session = self.stores["two"], self.runs[0].session
        meta = await store.load_session(TENANT, session)
        generations = [run.generation for run in self.runs]
        active = "" if self.model.active < 0 else generations[self.model.active]
        assert (meta.generations, meta.active, meta.state) == (generations, active, self.model.state)
        assert (meta.owner, meta.epoch) == (self.model.owner, self.model.epoch)
        records = await store.load_generations(TENANT, session, generations)
        assert [record.logs for record in records] == [log.ids for log in self.model.logs]
        assert [record.terminals for record in records] == [log.terminals for log in self.model.logs]

    def _opened(self, run: Run) -> None:
        assert run.epoch > self.model.epoch
        self.model.epoch = run.epoch
        self.runs.append(run)

    def _seen(self, owner: str, index: int) -> Run:
        return self.runs[index].seen_by(self.stores[owner], self.model.epoch)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(commands, min_size=5, max_size=40))
def test_every_history_is_as_the_rules_say(valkey_server: Valkey, history: list[tuple[Any, ...]]) -> None:
    async def run() -> None:
        async with open_stores(valkey_server.url, *OWNERS) as stores:
            both = History(stores)
            await both.start()
            for name, *arguments in history:
                await getattr(both, name)(*arguments)
            await both.compare()

    asyncio.run(run())
