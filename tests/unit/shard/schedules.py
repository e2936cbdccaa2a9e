"""Random schedules of stories: the real scheduler, block pool, runner and sampling program, every result looked at.

Sequences come, find prefixes, fork, wait for grants, lose their blocks, are released, lose their link, are taken over,
and come again with outputs that are known already, all of it decided by one seed.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from services.common import sampling
from services.common.errors import OwnerChanged
from services.common.sampling import Row
from services.shard.blocks import BlockPool
from services.shard.kernels.interface import Logits
from services.shard.outcome import Ended, Outcome
from services.shard.runner import Runner
from services.shard.scheduler import Batch, Scheduler
from services.shard.sequence import Admission
from tests.unit.shard.stories import Library, Story

Key: TypeAlias = tuple[int, int]
"""Link and attempt."""

LINKS = (1, 2)
MOST_STEPS = 2000
EVENTFUL_STEPS = 60
"""Nobody is disturbed later on, so that a schedule ends."""


@dataclass
class Coverage:
    """What schedules went through: events by name, and the numbers of tokens in a chunk and of chunks in a step."""

    events: Counter[str] = field(default_factory=Counter)
    chunk_sizes: set[int] = field(default_factory=set)
    batch_sizes: set[int] = field(default_factory=set)

    def see(self, batch: Batch) -> None:
        """Takes note of a step."""
        sizes = [len(chunk.token_ids) for chunk in batch.chunks]
        self.chunk_sizes.update(sizes)
        self.batch_sizes.add(len(sizes))
        self.events["mixed batches"] += 1 in sizes and max(sizes) > 1
        self.events["copied blocks"] += len(batch.copies)


@dataclass(frozen=True)
class Arrival:
    """A choice that asks to be admitted before a step, with outputs that its owner knows already."""

    step: int
    generation_id: str
    story: Story
    tenant: str
    priority: int
    link: int
    outputs: Sequence[int]
    epoch: int = 1


@dataclass
class Live:
    """A choice that is admitted and not at its end."""

    arrival: Arrival
    admission: Admission
    grant: int

    @property
    def outputs(self) -> list[int]:
        """Its output tokens so far."""
        return self.admission.token_ids[self.admission.row.output_start :]


def play(folder: Path, library: Library, seeds: Sequence[int], threads: int) -> Coverage:
    """Plays schedules one after the other on one runner, so that its pages are full of what others have left.

    Raises:
        AssertionError: bits, tokens or books are wrong; says where.
    """
    runner = library.setting.runner(folder, threads)
    assert torch.get_num_threads() == threads
    coverage = Coverage()
    for seed in seeds:
        Schedule(seed, library, runner, coverage).play()
    return coverage


class Schedule:
    """One random schedule.

    Args:
        seed: decides all that is random.
        library: whose stories are played.
        runner: computes; what its pages hold from before must not matter.
        coverage: takes note of what happens.
    """

    def __init__(self, seed: int, library: Library, runner: Runner, coverage: Coverage) -> None:
        self._seed, self._random, self._times = seed, random.Random(seed), random.Random(seed)
        self._library, self._runner, self._coverage = library, runner, coverage
        choose = self._random
        generations = choose.choices(library.generations, k=choose.randint(2, 5))
        longest = max(len(each.prompt) + len(library.told[each.name]) for stories in generations for each in stories)
        least = math.ceil(longest / library.setting.block_size)
        blocks = least + choose.choice([0, 0, 1, 2 * least])
        self._scheduler = Scheduler(
            BlockPool(blocks, library.setting.block_size, prefix_cache=choose.random() < 0.7),
            step_tokens=choose.choice([11, 16, 33, 64, 128, 256]),
            step_sequences=choose.choice([2, 8, 8]),
            step_time=self._times.choice([0.0, 0.02]),
            context_length=longest,
        )
        self._attempts = 0
        self._live: dict[Key, Live] = {}
        self._arrivals: list[Arrival] = []
        for number, stories in enumerate(generations):
            self._announce(f"g{number}", stories)

    def play(self) -> None:
        """Plays everybody to the end."""
        for step in range(MOST_STEPS):
            if not self._arrivals and not self._live:
                break
            self._command(step)
            self._scheduler.check_integrity()
            if self._scheduler.has_work:
                self._step()
        assert not self._live, f"schedule {self._seed}: somebody starves"
        load, events = self._scheduler.load, self._coverage.events
        events["preemptions"] += load.preemptions
        events["schedules with preemptions"] += load.preemptions > 0

    # A step, as in the loop of the engine.

    def _step(self) -> None:
        batch = self._scheduler.next()
        self._scheduler.check_integrity()
        self._coverage.see(batch)
        logits = self._runner.forward(batch)
        self._compare_logits(batch, logits)
        seconds = self._times.lognormvariate(-4, 1)  # made up
        outcome = self._scheduler.close(batch, sampling.draw(logits.values, batch.rows, best=logits.best), seconds)
        self._scheduler.check_integrity()
        self._compare_tokens(outcome)

    def _compare_logits(self, batch: Batch, logits: Logits) -> None:
        drawing = [chunk for chunk in batch.chunks if chunk.draws]
        for chunk, row, actual in zip(drawing, batch.rows, logits.values, strict=True):
            story, offset, size = self._story_of(row), len(row.token_ids) - row.output_start, len(chunk.token_ids)
            assert chunk.start + size == len(row.token_ids)
            if logits.best is not None and not sampling.reads_logits(row):
                continue  # only the best id was computed
            self._coverage.events["rows"] += 1
            self._coverage.events["prefilled outputs"] += offset > 0 and size > 1
            expected = self._library.told[story.name][offset].logits
            if actual.numpy().tobytes() != expected:
                gap = np.abs(actual.numpy() - np.frombuffer(expected, np.float32)).max()
                sizes = [len(each.token_ids) for each in batch.chunks]
                raise AssertionError(
                    f"schedule {self._seed}: logits of output {offset} of story {story.name} differ by up to {gap}, "
                    f"computed in a chunk of {size} from position {chunk.start} on, in a step of chunks of {sizes}"
                )

    def _compare_tokens(self, outcome: Outcome) -> None:
        assert outcome.ended == []
        for link, attempt, cached_tokens in outcome.admitted:
            alone = self._live[link, attempt].admission.fork_of is None
            self._coverage.events["prefix hits" if alone else "shared prompts"] += cached_tokens > 0
        for link, tokens in outcome.tokens.items():
            columns = (tokens.attempts, tokens.counts, tokens.token_ids, tokens.logprobs, tokens.top)
            for attempt, count, token_id, logprob, top in zip(*columns, strict=True):
                live = self._live[link, attempt]
                told = self._library.told[live.arrival.story.name]
                expected = told[count - 1]
                assert (token_id, repr(logprob), top) == (expected.token_id, repr(expected.logprob), expected.top), (
                    f"schedule {self._seed}: output {count - 1} of story {live.arrival.story.name} is another one"
                )
                assert count == len(live.outputs) <= live.grant
                if count == len(told):
                    self._coverage.events["ends"] += 1
                    del self._live[link, attempt]

    def _story_of(self, row: Row) -> Story:
        (story,) = (live.arrival.story for live in self._live.values() if live.admission.row is row)
        return story

    # What comes between steps.

    def _announce(self, generation_id: str, stories: Sequence[Story]) -> None:
        """Lets the choices of a generation come, mostly together, and mostly from their beginning."""
        choose = self._random
        step, link, priority = choose.randint(0, 3), choose.choice(LINKS), choose.choice([0, 0, 1])
        tenant = choose.choice("aaab")
        for story in stories:
            told = self._library.told[story.name]
            known = choose.choice([0, 0, choose.randrange(len(told))])
            outputs = [each.token_id for each in told[:known]]
            late = choose.choice([0, 0, choose.randint(1, 25)])
            self._arrivals.append(Arrival(step + late, generation_id, story, tenant, priority, link, outputs))

    def _command(self, step: int) -> None:
        for arrival in [each for each in self._arrivals if each.step <= step]:
            self._arrivals.remove(arrival)
            assert self._admit(arrival) == []
        if self._live and step < EVENTFUL_STEPS:
            event, key = self._random.random(), self._random.choice(list(self._live))
            if event < 0.03:
                self._release(key, step)
            elif event < 0.06:
                self._take_over(key, step)
            elif event < 0.07:
                self._lose_link(key[0], step)
        for (link, attempt), live in self._live.items():
            if len(live.outputs) == live.grant and self._random.random() < 0.5:
                live.grant += self._random.randint(1, 20)
                self._scheduler.grant(link, attempt, live.grant)

    def _admit(self, arrival: Arrival) -> list[Ended]:
        """Admits a choice, mostly as a fork where a sibling is there, and half of the times with a grant for a part."""
        self._attempts += 1
        siblings = [
            attempt
            for (link, attempt), live in self._live.items()
            if link == arrival.link and live.arrival.generation_id == arrival.generation_id
        ]
        most = arrival.story.max_count
        grant = self._random.choice([most, self._random.randint(len(arrival.outputs), most)])
        admission = arrival.story.admission(
            arrival.outputs,
            link=arrival.link,
            attempt=self._attempts,
            generation_id=arrival.generation_id,
            epoch=arrival.epoch,
            tenant=arrival.tenant,
            grant=grant,
            fork_of=self._random.choice(siblings) if siblings and self._random.random() < 0.8 else None,
            priority=arrival.priority,
        )
        self._live[arrival.link, self._attempts] = Live(arrival, admission, grant)
        return self._scheduler.admit(admission)

    def _release(self, key: Key, step: int) -> None:
        self._coverage.events["releases"] += 1
        self._scheduler.release(*key)
        again = self._again(key, step)
        if self._random.random() < 0.7:
            self._arrivals.append(again)

    def _lose_link(self, link: int, step: int) -> None:
        self._coverage.events["lost links"] += 1
        self._scheduler.release_link(link)
        self._arrivals += [self._again(key, step) for key in list(self._live) if key[0] == link]

    def _take_over(self, key: Key, step: int) -> None:
        """Admits a choice once more while it runs (R11)."""
        self._coverage.events["take-overs"] += 1
        (ended,) = self._admit(self._again(key, step))
        assert (ended.link, ended.attempt, type(ended.error)) == (*key, OwnerChanged)

    def _again(self, key: Key, step: int) -> Arrival:
        """Takes a choice out; its owner comes again soon, with the outputs that have reached him."""
        live = self._live.pop(key)
        return replace(
            live.arrival,
            step=step + self._random.randint(1, 15),
            link=self._random.choice(LINKS),
            outputs=live.outputs[: max(0, len(live.outputs) - self._random.randint(0, 2))],
            epoch=live.arrival.epoch + 1,
        )
