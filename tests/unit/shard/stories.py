"""Sequences for schedules, and what each of them gives alone.

A *story* is one choice of a generation: a prompt and the program that draws what follows. Told alone, one token at a
time by a runner that serves nobody else, it gives the bits that it must give in any company (R23).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from services.common import sampling
from services.common.types import SamplingProgram
from services.shard.runner import Runner
from services.shard.scheduler import Batch, Chunk
from services.shard.sequence import Admission
from tests.unit.shard.fakes import admission

CONTEXT = 170
"""Tokens at which a story ends; no multiple of a page."""

KV_MEMORY = 8 << 20
_TRUNK = 128


@dataclass(frozen=True)
class Story:
    """One choice of a generation; no other story has its `name`."""

    name: str
    prompt: tuple[int, ...]
    program: SamplingProgram
    choice: int
    max_count: int
    stops: tuple[int, ...]
    top_logprobs: int

    def ends_with(self, outputs: Sequence[int]) -> str:
        """Why it ends behind these outputs; empty where it goes on."""
        if outputs and outputs[-1] in self.stops:
            return "stop"
        if len(outputs) >= self.max_count:
            return "max_count"
        return "context" if len(self.prompt) + len(outputs) >= CONTEXT else ""

    def admission(
        self,
        outputs: Sequence[int] = (),
        *,
        link: int = 1,
        attempt: int = 1,
        generation_id: str = "alone",
        epoch: int = 1,
        tenant: str = "default",
        grant: int | None = None,
        fork_of: int | None = None,
        priority: int = 0,
    ) -> Admission:
        """An admission with some outputs known; None grants all of them."""
        return admission(
            list(self.prompt),
            outputs=outputs,
            link=link,
            attempt=attempt,
            generation_id=generation_id,
            choice=self.choice,
            epoch=epoch,
            tenant=tenant,
            max_count=self.max_count,
            grant=grant,
            fork_of=fork_of,
            priority=priority,
            stops=self.stops,
            program=self.program,
            top_logprobs=self.top_logprobs,
        )


class Told(NamedTuple):
    """An output token of a story told alone, with the float32 logits [V] behind which it was drawn."""

    token_id: int
    logits: bytes
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Setting:
    """How a model is computed."""

    kernels: str
    dtype: str
    block_size: int

    def runner(self, folder: Path, threads: int) -> Runner:
        """A fresh one, with its pool."""
        return Runner(
            folder,
            block_size=self.block_size,
            kv_memory=KV_MEMORY,
            threads=threads,
            dtype=self.dtype,
            kernels=self.kernels,
        )


class Library(NamedTuple):
    """Stories, and what each of them gives alone, by name, in one setting."""

    setting: Setting
    generations: list[list[Story]]
    told: dict[str, list[Told]]


def write_stories(seed: int, vocabulary_size: int, block_size: int) -> list[list[Story]]:
    """Generations of one to three choices, by every kind of program; the first one is longer than its context.

    Many prompts begin with the same whole blocks, and some have equal blocks behind a first one that differs.
    """
    draw = random.Random(seed)
    ids = range(vocabulary_size)
    trunk = draw.choices(ids, k=_TRUNK)
    trunks = [trunk, draw.choices(ids, k=block_size) + trunk[block_size:]]
    generations = []
    for number, (kind, program) in enumerate(2 * list(_programs(vocabulary_size).items())):
        common = block_size * min(draw.choice([0, 0, 1, 2, 2]), _TRUNK // block_size)
        length = CONTEXT - 15 if number == 0 else common + draw.choice([1, 7, 16, 30])
        story = Story(
            name=f"{number} ({kind})",
            prompt=tuple(draw.choice(trunks)[:common] + draw.choices(ids, k=length - common)),
            program=replace(program, seed=draw.getrandbits(64)),
            choice=0,
            max_count=CONTEXT if number == 0 else draw.randint(8, 45),
            stops=tuple(draw.choices(ids, k=10)) if number % 3 == 1 else (),
            top_logprobs=draw.choice([0, 3]),
        )
        choices = range(1 if number == 0 else draw.choice([1, 1, 2, 3]))
        generations.append([replace(story, name=f"{story.name}, choice {each}", choice=each) for each in choices])
    return generations


def tell(folder: Path, story: Story, setting: Setting) -> list[Told]:
    """Tells a story alone: a fresh runner and pool, one thread, a batch of one, and one token in a step."""
    runner, block_size = setting.runner(folder, threads=1), setting.block_size
    alone = story.admission()
    token_ids, told = alone.token_ids, list[Told]()
    for position in range(CONTEXT):
        draws = position == len(token_ids) - 1
        table = list(range(position // block_size + 1))
        logits = runner.forward(Batch([Chunk(position, [token_ids[position]], table, draws)], [])).values
        if draws:
            (token_id,), (logprob,), (top,) = sampling.draw(logits, [alone.row])
            told.append(Told(token_id, logits.numpy().tobytes(), logprob, top))
            token_ids.append(token_id)
            if story.ends_with(token_ids[len(story.prompt) :]):
                break
    return told


def _programs(vocabulary_size: int) -> dict[str, SamplingProgram]:
    return {
        "greedy": SamplingProgram(),
        "two levels": SamplingProgram(temperature=0.9),
        "top-k": SamplingProgram(temperature=1.2, top_k=20),
        "top-p": SamplingProgram(temperature=0.8, top_p=0.9),
        "min-p": SamplingProgram(temperature=1.0, min_p=0.02),
        "penalties": SamplingProgram(
            temperature=0.7, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3
        ),
        "bias": SamplingProgram(temperature=1.0, top_k=50, logit_bias={5: 4.0, 9: -3.0}, bad_words=((7,), (5, 5))),
        "allowed": SamplingProgram(temperature=1.5, allowed_token_ids=tuple(range(0, vocabulary_size, 3))),
    }
