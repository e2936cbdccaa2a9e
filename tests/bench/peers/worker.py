"""The inner end of a measured engine: a process that loads a model and then does what it is told, one line at a time.

It runs in the environment of its engine, so it may import nothing but Python's own library. Each request is one line
of JSON on standard input, each answer one line on standard output; whatever an engine prints goes to standard error.

    {"batch": B, "prompt": P, "seed": S, "tokens": N}  ->  {"seconds": T, "token_ids": [the first 8 of each sequence]}

Knows neither which engine it hosts nor what is made of the times.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Generate = Callable[[list[list[int]], int], Sequence[Sequence[int]]]
"""Prompts of one length and a count in; greedily, and deaf to the end of text, so many ids per prompt out."""

Load = Callable[[Path, str, int], Generate]
"""A folder or file, a precision and a number of threads in; the engine that is ready to generate out."""

SHOWN = 8
"""Ids per sequence in an answer: enough to see that two engines compute the same model."""


def random_prompts(batch: int, length: int, seed: int, vocabulary_size: int) -> list[list[int]]:
    """Ids in the middle of the vocabulary, where no control token is."""
    generator = random.Random(f"{seed} {batch} {length}")
    low, high = vocabulary_size // 4, 3 * vocabulary_size // 4
    return [[generator.randrange(low, high) for _ in range(length)] for _ in range(batch)]


def main(load: Load, distribution: str) -> None:
    """Serves until standard input ends; the first line that goes out says that the model is loaded.

    Args:
        load: of the engine.
        distribution: name of its package, whose version is told.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("precision")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--vocabulary-size", type=int, required=True)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    generate = load(options.model, options.precision, options.threads)
    answers.write(json.dumps({"version": importlib.metadata.version(distribution)}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        prompts = random_prompts(request["batch"], request["prompt"], request["seed"], options.vocabulary_size)
        answers.write(json.dumps(_timed(generate, prompts, request["tokens"])) + "\n")
    answers.close()
    os._exit(0)  # engines with threads of their own do not all end by themselves


def _timed(generate: Generate, prompts: list[list[int]], count: int) -> dict[str, object]:
    begin = time.perf_counter()
    sequences = generate(prompts, count)
    seconds = time.perf_counter() - begin
    lengths = [len(sequence) for sequence in sequences]
    if lengths != [count] * len(prompts):
        raise RuntimeError(f"{count} tokens for each of {len(prompts)} prompts were asked for, and came: {lengths}")
    return {"seconds": seconds, "token_ids": [[int(each) for each in sequence[:SHOWN]] for sequence in sequences]}
