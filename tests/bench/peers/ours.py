"""The worker of this project's engine: what a shard puts together, driven in the main thread, without links."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

from services.common import sampling
from services.common.sampling import Row
from services.common.types import SamplingProgram
from services.shard.blocks import BlockPool
from services.shard.runner import Runner
from services.shard.scheduler import Scheduler
from services.shard.sequence import Admission
from tests.bench.peers import worker

DTYPES = {"bf16": "bfloat16", "fp32": "float32", "int8": "int8"}
BLOCK_SIZE = 64
KV_MEMORY = 1 << 30
STEP_TOKENS = 512
STEP_SEQUENCES = 64


def load(folder: Path, precision: str, threads: int) -> worker.Generate:
    """Loads a checkpoint as a shard does."""
    runner = Runner(folder, block_size=BLOCK_SIZE, kv_memory=KV_MEMORY, threads=threads, dtype=DTYPES[precision])
    gc.freeze()

    def generate(prompts: list[list[int]], count: int) -> Sequence[Sequence[int]]:
        scheduler = Scheduler(
            BlockPool(runner.block_count, BLOCK_SIZE, prefix_cache=False),
            step_tokens=STEP_TOKENS,
            step_sequences=STEP_SEQUENCES,
            context_length=min(runner.context_length, runner.block_count * BLOCK_SIZE),
        )
        admissions = [_admission(number, prompt, count) for number, prompt in enumerate(prompts)]
        for admission in admissions:
            scheduler.admit(admission)
        while scheduler.has_work:
            batch = scheduler.next()
            scheduler.close(
                batch, sampling.draw((logits := runner.forward(batch)).values, batch.rows, best=logits.best)
            )
        return [each.token_ids[each.row.output_start :] for each in admissions]

    return generate


def _admission(number: int, prompt: list[int], count: int) -> Admission:
    """A greedy generation of so many tokens, that nothing ends before."""
    token_ids = list(prompt)
    return Admission(
        link=1,
        attempt=number,
        generation_id=str(number),
        epoch=1,
        tenant="",
        token_ids=token_ids,
        row=Row(program=SamplingProgram(), token_ids=token_ids, output_start=len(prompt), choice=0),
        max_count=count,
        grant=count,
    )


if __name__ == "__main__":
    worker.main(load, "fermata-server")
