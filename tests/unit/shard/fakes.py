"""A model without tensors, and admissions for it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray

from services.common.sampling import Drawn, Row
from services.common.types import SamplingProgram
from services.shard.blocks import BlockPool
from services.shard.kernels.interface import Logits
from services.shard.outcome import Outcome
from services.shard.scheduler import Batch, Scheduler
from services.shard.sequence import Admission

VOCABULARY = 32
SIZE = 4
_MULTIPLIER, _MASK = 6364136223846793005, (1 << 64) - 1


def _mix(state: int, value: int) -> int:
    mixed = ((state ^ value) * _MULTIPLIER + 1442695040888963407) & _MASK
    return mixed ^ (mixed >> 29)


def cells_of(token_ids: Iterable[int], before: int = 0) -> list[int]:
    """The "KV" of tokens: each cell depends on its token and on all before it."""
    cells = []
    for token_id in token_ids:
        before = _mix(before, token_id)
        cells.append(before)
    return cells


def logits_of(cells: Iterable[int]) -> NDArray[np.float32]:
    """Logits [VOCABULARY] that depend on every cell, as attention does."""
    return _logits(reduce(_mix, cells, 1))


def _logits(state: int) -> NDArray[np.float32]:
    return np.array([(_mix(state, token_id) >> 40) / (1 << 22) for token_id in range(VOCABULARY)], np.float32)


def alone(prompt: list[int], count: int, stops: Iterable[int] = ()) -> list[int]:
    """The tokens that a greedy sequence gets when nobody else is there."""
    outputs: list[int] = []
    cells = cells_of(prompt)
    cell, state = cells[-1], reduce(_mix, cells, 1)
    while len(outputs) < count and not (outputs and outputs[-1] in stops):
        outputs.append(int(np.argmax(_logits(state))))
        cell = _mix(cell, outputs[-1])
        state = _mix(state, cell)
    return outputs


class FakeRunner:
    """Reads and writes a real pool of cells through the block tables, so that any wrong block changes the tokens.

    Args:
        block_count: blocks of the pool.
        block_size: cells per block.
        delay: seconds that a step takes.
        poison: a sequence whose last token is this one gets logits that are no numbers.
    """

    def __init__(self, block_count: int, block_size: int, *, delay: float = 0.0, poison: int | None = None) -> None:
        self.block_size, self.delay, self.poison = block_size, delay, poison
        self.pool = [[-1] * block_size for _ in range(block_count)]
        self.batches: list[Batch] = []

    def forward(self, batch: Batch) -> Logits:
        assert batch.chunks, "an empty batch was computed"
        self.batches.append(batch)
        if self.delay:
            time.sleep(self.delay)
        sources, targets = [pair[0] for pair in batch.copies], [pair[1] for pair in batch.copies]
        assert len(set(targets)) == len(targets) and not set(targets) & set(sources), batch.copies
        for source, target in batch.copies:
            self.pool[target] = list(self.pool[source])
        rows = []
        for chunk in batch.chunks:
            end = chunk.start + len(chunk.token_ids)
            assert len(chunk.block_table) == -(-end // self.block_size)
            assert len(set(chunk.block_table)) == len(chunk.block_table)
            past = [self._cell(chunk.block_table, position) for position in range(chunk.start)]
            new = cells_of(chunk.token_ids, past[-1] if past else 0)
            for position, cell in enumerate(new, chunk.start):
                self.pool[chunk.block_table[position // self.block_size]][position % self.block_size] = cell
            if chunk.draws:
                logits = logits_of(past + new)
                rows.append(np.full_like(logits, np.nan) if chunk.token_ids[-1] == self.poison else logits)
        return Logits(torch.from_numpy(np.stack(rows) if rows else np.zeros((0, VOCABULARY), np.float32)))

    def _cell(self, table: list[int], position: int) -> int:
        return self.pool[table[position // self.block_size]][position % self.block_size]


def admission(
    prompt: list[int],
    *,
    attempt: int = 1,
    link: int = 1,
    generation_id: str | None = None,
    choice: int = 0,
    epoch: int = 1,
    tenant: str = "default",
    outputs: Iterable[int] = (),
    max_count: int = 8,
    grant: int | None = None,
    fork_of: int | None = None,
    priority: int = 0,
    stops: Iterable[int] = (),
    program: SamplingProgram | None = None,
    top_logprobs: int = 0,
) -> Admission:
    """A greedy admission that may run to its end, with what a test cares for changed."""
    token_ids = [*prompt, *outputs]
    row = Row(
        program=program or SamplingProgram(),
        token_ids=token_ids,
        output_start=len(prompt),
        choice=choice,
        stop_token_ids=tuple(stops),
        top_logprobs=top_logprobs,
        logprobs=top_logprobs > 0,
    )
    return Admission(
        link=link,
        attempt=attempt,
        generation_id=f"{link}.{attempt}" if generation_id is None else generation_id,
        epoch=epoch,
        tenant=tenant,
        token_ids=token_ids,
        row=row,
        max_count=max_count,
        grant=max_count if grant is None else grant,
        fork_of=fork_of,
        priority=priority,
    )


def greedy(logits: Logits) -> Drawn:
    """The draw of greedy rows, without the sampling program."""
    token_ids = [int(np.argmax(row)) if np.isfinite(row).all() else -1 for row in logits.values.numpy()]
    return Drawn(token_ids, [float("nan")] * len(token_ids), [[] for _ in token_ids])


def make(
    *,
    blocks: int = 16,
    step_tokens: int = 16,
    step_sequences: int = 4,
    step_time: float = 0.0,
    context: int | None = None,
    prefix_cache: bool = True,
    poison: int | None = None,
) -> tuple[Scheduler, FakeRunner]:
    scheduler = Scheduler(
        BlockPool(blocks, SIZE, prefix_cache=prefix_cache),
        step_tokens=step_tokens,
        step_sequences=step_sequences,
        step_time=step_time,
        context_length=blocks * SIZE if context is None else context,
    )
    return scheduler, FakeRunner(blocks, SIZE, poison=poison)


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first + index) % 31 for index in range(length)]


def step(scheduler: Scheduler, runner: FakeRunner, seconds: float = 0.0) -> tuple[Batch, Outcome]:
    """One turn of the loop that is said to have taken so long, with the books checked after it."""
    batch = scheduler.next()
    scheduler.check_integrity()
    outcome = scheduler.close(batch, greedy(runner.forward(batch)), seconds)
    scheduler.check_integrity()
    return batch, outcome


def finish(scheduler: Scheduler, runner: FakeRunner, most_steps: int = 2000) -> dict[tuple[int, int], list[int]]:
    """Runs until nobody may draw. Returns the tokens by link and attempt."""
    drawn: dict[tuple[int, int], list[int]] = {}
    for _ in range(most_steps):
        if not scheduler.has_work:
            return drawn
        _, outcome = step(scheduler, runner)
        for link, tokens in outcome.tokens.items():
            for attempt, token_id in zip(tokens.attempts, tokens.token_ids, strict=True):
                drawn.setdefault((link, attempt), []).append(token_id)
    raise AssertionError(f"still busy after {most_steps} steps: {scheduler.load}")
