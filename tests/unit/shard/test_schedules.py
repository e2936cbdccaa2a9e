"""Bit-identity (R23): in hundreds of random schedules every sequence is computed as if it were alone.

Each row of logits that is drawn from must have the bits that the sequence gives alone, one token at a time, whoever
shares its batch, however its tokens are cut into chunks, whatever it finds in the prefix cache, shares with a sibling,
or computes again after a preemption or with known outputs. So must each token.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from services.shard.models.families import llama
from tests.random_model import random_model, write_model
from tests.reference import Reference
from tests.unit.shard.schedules import play
from tests.unit.shard.stories import Library, Setting, tell, write_stories

MODEL = llama.architecture(
    vocabulary_size=250,
    hidden_size=96,
    intermediate_size=1100,
    layer_count=2,
    head_count=6,
    kv_head_count=2,
    head_size=16,
    context_length=256,
)
"""Tiny, but with a product so long that a BLAS splits it between threads, shared kv heads, and a vocabulary that no
vector divides."""

SEEDS, TWO_THREADED_SEEDS = range(40), range(40, 55)
"""What every setting plays."""

MORE_SEEDS = range(55, int(os.environ.get("FERMATA_SCHEDULES", "55")))
"""`make soak` plays two hundred."""

SETTINGS = {
    "native float32": Setting("native", "float32", 64),
    "native bfloat16": Setting("native", "bfloat16", 64),
    "native int8": Setting("native", "int8", 64),
    "native, small pages": Setting("native", "bfloat16", 32),
    "plain": Setting("plain", "float32", 64),
    "plain, small pages": Setting("plain", "float32", 16),
}

SEEN = {
    "rows": 2000,  # of logits, each compared
    "ends": 100,  # of sequences, with all of their tokens
    "mixed batches": 50,  # prefill beside decode
    "prefilled outputs": 50,  # drawn behind a longer chunk, where alone they are drawn behind one token
    "prefix hits": 20,
    "shared prompts": 20,  # forks
    "copied blocks": 4,  # copy-on-write
    "preemptions": 10,
    "schedules with preemptions": 8,
    "releases": 20,
    "take-overs": 20,
    "lost links": 5,
}
"""What 40 schedules must have gone through at least; they do so about twice as often."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "random", random_model(MODEL))


@pytest.fixture(scope="module", params=SETTINGS)
def library(request: pytest.FixtureRequest, folder: Path) -> Library:
    setting = SETTINGS[request.param]
    generations = write_stories(setting.block_size, MODEL.vocabulary_size, block_size=setting.block_size)
    told = {story.name: tell(folder, story, setting) for stories in generations for story in stories}
    return Library(setting, generations, told)


def test_alone_agrees_with_the_reference(folder: Path, library: Library) -> None:
    """What all schedules are held to are the model's numbers, and where they are no near tie its choice."""
    reference = Reference(folder)
    for story in [story for stories in library.generations for story in stories]:
        told = library.told[story.name]
        token_ids = [*story.prompt, *(each.token_id for each in told)]
        expected = reference.logits(token_ids[:-1])[len(story.prompt) - 1 :]
        actual = torch.from_numpy(np.stack([np.frombuffer(each.logits, np.float32) for each in told]))
        if library.setting.dtype != "float32":  # an order of magnitude; test_native_kernels.py is exact
            assert (actual - expected).abs().max() < expected.std()
            continue
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        best = expected.topk(2).values
        clear = best[:, 0] - best[:, 1] > 1e-3
        assert clear.any()
        assert torch.equal(actual.argmax(-1)[clear], expected.argmax(-1)[clear])


def test_stories_end_in_every_way_and_share_prompts(library: Library) -> None:
    stories = [story for stories in library.generations for story in stories]
    ends = {story.ends_with([each.token_id for each in library.told[story.name]]) for story in stories}
    assert ends == {"stop", "max_count", "context"}
    page = library.setting.block_size
    starts = [stories[0].prompt[:page] for stories in library.generations if len(stories[0].prompt) > page]
    assert len(set(starts)) < len(starts), "of different generations"
    assert {len(stories) for stories in library.generations} == {1, 2, 3}


def test_schedules_do_not_change_bits(folder: Path, library: Library) -> None:
    coverage = play(folder, library, SEEDS, threads=1)
    assert {name: coverage.events[name] for name in SEEN if coverage.events[name] < SEEN[name]} == {}
    assert len(coverage.chunk_sizes) >= 30 and max(coverage.chunk_sizes) > 128
    assert coverage.batch_sizes >= {1, 2, 3, 4}


def test_two_threads_of_another_process_do_not_change_bits(
    folder: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # spinning threads would take the cores from each other
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        coverage = process.submit(play, folder, library, [*TWO_THREADED_SEEDS, *MORE_SEEDS], threads=2).result()
    assert {name for name in SEEN if not coverage.events[name]} == set()
