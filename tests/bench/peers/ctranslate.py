"""The worker of CTranslate2."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.peers import worker

COMPUTE_TYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8_float32"}


def load(folder: Path, precision: str, threads: int) -> worker.Generate:
    """Loads a folder that `ct2-transformers-converter` wrote.

    Raises:
        ValueError: the library has no such arithmetic on this processor.
    """
    library: Any = importlib.import_module("ctranslate2")
    compute_type = COMPUTE_TYPES[precision]
    if compute_type not in library.get_supported_compute_types("cpu"):
        raise ValueError(f"{compute_type} is not supported on this processor")
    generator = library.Generator(
        str(folder), device="cpu", compute_type=compute_type, intra_threads=threads, inter_threads=1
    )
    vocabulary = json.loads((folder / "vocabulary.json").read_text())

    def generate(prompts: list[list[int]], count: int) -> Sequence[Sequence[int]]:
        results = generator.generate_batch(
            [[vocabulary[token] for token in prompt] for prompt in prompts],
            max_length=count,
            min_length=count,
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        return [result.sequences_ids[0] for result in results]

    return generate


if __name__ == "__main__":
    worker.main(load, "ctranslate2")
