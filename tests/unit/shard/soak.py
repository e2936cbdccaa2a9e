"""Thousands of random choices through one scheduler, whose pool holds a tenth of what they would like to have.

They come from many tenants, at several priorities and over several links; they fork, wait for grants, lose their
blocks, are cancelled, lose their link, are taken over, and come again with outputs that are known already. The model is
a fake that reads everything through the block tables, so that a wrong block changes tokens. All is decided by a seed.
"""

from __future__ import annotations

import gc
import random
import sys
from collections import Counter
from dataclasses import dataclass, field

from services.common.errors import OwnerChanged
from services.shard.blocks import BlockPool
from services.shard.outcome import Ended
from services.shard.scheduler import Scheduler
from services.shard.sequence import Sequence
from tests.unit.shard.fakes import VOCABULARY, FakeRunner, admission, alone, step

BLOCK_SIZE = 4
ALIVE = 80
LINKS, TENANTS = range(1, 6), 400
LONGEST_PROMPT, MOST_OUTPUTS = 30, 60
CONTEXT = LONGEST_PROMPT + MOST_OUTPUTS
BLOCKS = ALIVE * (LONGEST_PROMPT // 2 + MOST_OUTPUTS // 2) // BLOCK_SIZE // 10
"""A tenth of what those who are alive need for all of their tokens, on the average."""
TRUNKS = [[(7 * trunk + place * place) % 31 for place in range(LONGEST_PROMPT)] for trunk in range(6)]


@dataclass
class Choice:
    """A choice until its end. Its next owner knows `outputs`, the first ones of `tokens`; `given` were not drawn."""

    generation_id: str
    prompt: list[int]
    tokens: list[int]
    stops: list[int]
    tenant: str
    priority: int
    given: int
    outputs: list[int]
    epoch: int = 0
    grant: int = 0


@dataclass
class Report:
    """What a soak went through.

    Attributes:
        events: by name.
        steps: of the scheduler.
        allocated: memory blocks of the interpreter, at each tenth of the choices.
        retained: sequences that are left when all have ended.
    """

    events: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    allocated: list[int] = field(default_factory=list)
    retained: int = 0


class Soak:
    """Runs `count` choices to their end.

    Raises:
        AssertionError: tokens or books are wrong, or somebody starves; says where.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._random = count, random.Random(seed)
        self._runner = FakeRunner(BLOCKS, BLOCK_SIZE)
        self._scheduler = Scheduler(
            BlockPool(BLOCKS, BLOCK_SIZE),
            step_tokens=48,
            step_sequences=24,
            step_time=0.03,
            context_length=CONTEXT,
        )
        self._alive: dict[tuple[int, int], Choice] = {}
        self._homeless: list[Choice] = []
        self._attempts = self._begun = 0
        self._report = Report()

    def run(self) -> Report:
        report, events, before = self._report, self._report.events, _sequences()
        while self._begun < self._count or self._alive or self._homeless:
            self._command()
            self._scheduler.check_integrity()
            if self._scheduler.has_work:
                self._step()
            report.steps += 1
            assert report.steps < 100 * (self._count + 100), "somebody starves"
            if self._begun * 10 >= self._count * (len(report.allocated) + 1):
                gc.collect()
                report.allocated.append(sys.getallocatedblocks())
        load = self._scheduler.load
        assert (load.running, load.waiting, load.free_blocks) == (0, 0, BLOCKS)
        events["preemptions"], events["prefix hits"] = load.preemptions, load.cached_tokens
        report.retained = _sequences() - before
        return report

    def _step(self) -> None:
        batch, outcome = step(self._scheduler, self._runner, self._random.lognormvariate(-4, 1))
        self._runner.batches.clear()
        self._report.events["copied blocks"] += len(batch.copies)
        assert outcome.ended == []
        for link, drawn in outcome.tokens.items():
            for attempt, token_id, count in zip(drawn.attempts, drawn.token_ids, drawn.counts, strict=True):
                choice = self._alive[link, attempt]
                choice.outputs.append(token_id)
                assert (count, choice.outputs[-1]) == (len(choice.outputs), choice.tokens[count - 1])
                assert count <= choice.grant
                if count == len(choice.tokens):
                    self._report.events["ends"] += 1
                    del self._alive[link, attempt]

    # What comes between steps.

    def _command(self) -> None:
        draw = self._random
        for choice in self._homeless:
            self._admit(choice, draw.choice(LINKS))
        self._homeless.clear()
        while self._begun < self._count and len(self._alive) < ALIVE and draw.random() < 0.8:
            self._begin()
        if self._alive:
            event, key = draw.random(), draw.choice(list(self._alive))
            if event < 0.04:
                self._report.events["cancels"] += 1
                self._scheduler.release(*key)
                del self._alive[key]
            elif event < 0.08:
                self._take_over(key)
            elif event < 0.085:
                self._lose_link(key[0])
        for (link, attempt), choice in self._alive.items():
            if len(choice.outputs) == choice.grant and draw.random() < 0.3:
                choice.grant += draw.randint(1, MOST_OUTPUTS)
                self._scheduler.grant(link, attempt, choice.grant)

    def _begin(self) -> None:
        """A generation comes with its choices, most often one."""
        draw, link = self._random, self._random.choice(LINKS)
        length = draw.randint(1, LONGEST_PROMPT)
        common = draw.randint(0, length)
        prompt = draw.choice(TRUNKS)[:common] + [draw.randrange(VOCABULARY - 1) for _ in range(length - common)]
        # Few tenants ask for most.
        tenant, priority = f"tenant {int(TENANTS * draw.random() ** 4)}", draw.choice([-1, 0, 0, 0, 1])
        leader = None
        for number in range(draw.choice([1, 1, 1, 4])):
            known = [draw.randrange(VOCABULARY - 1) for _ in range(number)]  # so that choices differ
            stops = draw.choice([[], [], [VOCABULARY - 1]])
            tokens = known + alone(prompt + known, draw.randint(1, MOST_OUTPUTS - number), stops)
            choice = Choice(f"g{self._begun}", prompt, tokens, stops, tenant, priority, number, known)
            self._begun += 1
            attempt = self._admit(choice, link, leader)
            leader = leader or attempt

    def _admit(
        self, choice: Choice, link: int, fork_of: int | None = None, ended: tuple[int, int] | None = None
    ) -> int:
        """Admits a choice, which ends another admission of it or none; most often with a grant for a part."""
        self._attempts += 1
        self._report.events["forks"] += fork_of is not None
        choice.epoch += 1
        choice.grant = len(choice.outputs) + self._random.randint(0, MOST_OUTPUTS)
        self._alive[link, self._attempts] = choice
        refused = self._scheduler.admit(
            admission(
                choice.prompt,
                link=link,
                attempt=self._attempts,
                generation_id=choice.generation_id,
                epoch=choice.epoch,
                tenant=choice.tenant,
                outputs=choice.outputs,
                max_count=len(choice.tokens),
                grant=choice.grant,
                fork_of=fork_of,
                priority=choice.priority,
                stops=choice.stops,
            )
        )
        assert [_key(each) for each in refused] == ([ended] if ended else [])
        return self._attempts

    def _take_over(self, key: tuple[int, int]) -> None:
        """Another owner admits a choice while it runs (R11)."""
        self._report.events["take-overs"] += 1
        choice = self._alive.pop(key)
        self._forget_some(choice)
        self._admit(choice, self._random.choice(LINKS), ended=key)

    def _lose_link(self, link: int) -> None:
        self._report.events["lost links"] += 1
        self._scheduler.release_link(link)
        for key in [key for key in self._alive if key[0] == link]:
            choice = self._alive.pop(key)
            self._forget_some(choice)
            self._homeless.append(choice)

    def _forget_some(self, choice: Choice) -> None:
        """The last tokens have not reached their reader."""
        del choice.outputs[max(choice.given, len(choice.outputs) - self._random.randint(0, 2)) :]


def _sequences() -> int:
    """How many there are in this process, in use or not."""
    gc.collect()
    return sum(type(each) is Sequence for each in gc.get_objects())


def _key(ended: Ended) -> tuple[int, int]:
    assert isinstance(ended.error, OwnerChanged)
    return ended.link, ended.attempt
