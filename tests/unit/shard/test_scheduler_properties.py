"""Scheduler under any order of commands, with pools that are too small: the books balance and nobody starves."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.common.errors import OwnerChanged
from services.shard.blocks import BlockPool
from services.shard.outcome import Ended
from services.shard.scheduler import Scheduler
from tests.unit.shard.fakes import FakeRunner, admission, alone, step

BLOCKS, SIZE = 6, 4
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9][:length] for length in (1, 3, 4, 5, 8, 9)] + [[1, 2, 3, 4, 9, 9], [7] * 7]
MOST_OUTPUTS = 8
STOP = 31


@dataclass(frozen=True)
class Asked:
    """An admission in the words of this test; `known` outputs are known already."""

    generation_id: str
    prompt: list[int]
    known: int
    grant: int
    link: int = 1
    epoch: int = 1
    priority: int = 0
    tenant: str = "a"
    fork_of: int | None = None


@dataclass
class Expected:
    """What an admission must give: all its tokens in order, of which it has `count`."""

    asked: Asked
    tokens: list[int]
    count: int
    grant: int


class Commands(RuleBasedStateMachine):
    """Random admissions, siblings, grants, releases and take-overs between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = FakeRunner(BLOCKS, SIZE)
        self.scheduler: Scheduler
        self.alive: dict[tuple[int, int], Expected] = {}
        self.attempts = 0
        self.started = False

    @precondition(lambda self: not self.started)
    @rule(
        step_tokens=st.integers(1, 12),
        step_sequences=st.integers(1, 4),
        step_time=st.sampled_from([0.0, 0.005, 10.0]),
        prefix_cache=st.booleans(),
    )
    def start(self, step_tokens: int, step_sequences: int, step_time: float, prefix_cache: bool) -> None:
        self.started = True
        self.scheduler = Scheduler(
            BlockPool(BLOCKS, SIZE, prefix_cache=prefix_cache),
            step_tokens=step_tokens,
            step_sequences=step_sequences,
            step_time=step_time,
            context_length=BLOCKS * SIZE,
        )

    @precondition(lambda self: self.started)
    @rule(
        link=st.integers(1, 2),
        prompt=st.sampled_from(PROMPTS),
        known=st.integers(0, 3),
        grant=st.integers(0, MOST_OUTPUTS),
        whose=st.tuples(st.sampled_from("aab"), st.integers(-1, 1)),
    )
    def admit(self, link: int, prompt: list[int], known: int, grant: int, whose: tuple[str, int]) -> None:
        tenant, priority = whose
        self._admit(Asked(f"g{self.attempts}", prompt, known, grant, link=link, priority=priority, tenant=tenant))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), known=st.integers(0, 3), grant=st.integers(0, MOST_OUTPUTS), priority=st.integers(-1, 1))
    def fork(self, data: st.DataObject, known: int, grant: int, priority: int) -> None:
        (link, attempt), leader = data.draw(st.sampled_from(sorted(self.alive.items(), key=lambda item: item[0])))
        name = f"{leader.asked.generation_id}+{self.attempts}"
        of = leader.asked
        asked = Asked(name, of.prompt, known, grant, link=link, priority=priority, tenant=of.tenant, fork_of=attempt)
        self._admit(asked)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), link=st.integers(1, 2), newer=st.integers(-1, 1), grant=st.integers(0, MOST_OUTPUTS))
    def take_over(self, data: st.DataObject, link: int, newer: int, grant: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.alive)))
        older = self.alive[key]
        known = data.draw(st.integers(0, min(older.count, 7)))
        asked = replace(older.asked, known=known, grant=grant, link=link, epoch=older.asked.epoch + newer, fork_of=None)
        (ended,) = self._admit(asked)
        refused = (link, self.attempts) if newer < 0 else key
        assert (ended.link, ended.attempt) == refused
        assert isinstance(ended.error, OwnerChanged)
        del self.alive[refused]

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), count=st.integers(0, MOST_OUTPUTS + 2))
    def grant(self, data: st.DataObject, count: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.alive)))
        self.scheduler.grant(*key, count)
        self.alive[key].grant = max(self.alive[key].grant, count)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.alive)))
        self.scheduler.release(*key)
        del self.alive[key]

    @precondition(lambda self: self.started)
    @rule(link=st.integers(1, 2))
    def lose_link(self, link: int) -> None:
        self.scheduler.release_link(link)
        self.alive = {key: expected for key, expected in self.alive.items() if key[0] != link}

    @precondition(lambda self: self.started and self.scheduler.has_work)
    @rule(times=st.integers(1, 5), seconds=st.sampled_from([0.0, 0.001, 0.01, 1.0]))
    def run(self, times: int, seconds: float) -> None:
        for _ in range(times):
            if self.scheduler.has_work:
                self._step(seconds)

    @invariant()
    def books_balance(self) -> None:
        if self.started:
            self.scheduler.check_integrity()
            assert self.scheduler.has_work == any(
                expected.count < expected.grant for expected in self.alive.values()
            ), "who may draw and who should differ"

    def teardown(self) -> None:
        """With every grant given, everybody finishes."""
        if not self.started:
            return
        for key in list(self.alive):
            self.scheduler.grant(*key, MOST_OUTPUTS)
            self.alive[key].grant = MOST_OUTPUTS
        for _ in range(4 * (len(self.alive) + 1) * BLOCKS * SIZE):
            if not self.scheduler.has_work:
                break
            self._step()
        assert self.alive == {}, "somebody starves"
        assert self.scheduler.load.free_blocks == BLOCKS

    def _admit(self, asked: Asked) -> list[Ended]:
        self.attempts += 1
        tokens = alone(asked.prompt, MOST_OUTPUTS, [STOP])
        known = min(asked.known, len(tokens) - 1)
        self.alive[asked.link, self.attempts] = Expected(asked, tokens, known, asked.grant)
        return self.scheduler.admit(
            admission(
                asked.prompt,
                link=asked.link,
                attempt=self.attempts,
                generation_id=asked.generation_id,
                epoch=asked.epoch,
                outputs=tokens[:known],
                max_count=MOST_OUTPUTS,
                grant=asked.grant,
                fork_of=asked.fork_of,
                priority=asked.priority,
                tenant=asked.tenant,
                stops=[STOP],
            )
        )

    def _step(self, seconds: float = 0.01) -> None:
        _, outcome = step(self.scheduler, self.runner, seconds)
        assert outcome.ended == []
        for link, drawn in outcome.tokens.items():
            for attempt, token_id, count in zip(drawn.attempts, drawn.token_ids, drawn.counts, strict=True):
                expected = self.alive[link, attempt]
                assert (count, token_id) == (expected.count + 1, expected.tokens[expected.count])
                assert count <= expected.grant
                expected.count = count
                if count == len(expected.tokens):
                    del self.alive[link, attempt]


TestCommands = Commands.TestCase
TestCommands.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
