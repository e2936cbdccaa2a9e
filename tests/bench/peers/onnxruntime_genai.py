"""The worker of ONNX Runtime GenAI."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.peers import worker


def load(folder: Path, precision: str, threads: int) -> worker.Generate:
    """Loads a folder that `onnxruntime_genai.models.builder` wrote, in the precision that it has."""
    genai: Any = importlib.import_module("onnxruntime_genai")
    numpy: Any = importlib.import_module("numpy")
    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)

    def generate(prompts: list[list[int]], count: int) -> Sequence[Sequence[int]]:
        length = len(prompts[0])
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(
            max_length=length + count, min_length=length + count, do_sample=False, batch_size=len(prompts)
        )
        generator = genai.Generator(model, parameters)
        generator.append_tokens(numpy.array(prompts, dtype=numpy.int32))
        for _ in range(count):
            generator.generate_next_token()
        return [generator.get_sequence(index)[length:] for index in range(len(prompts))]

    return generate


if __name__ == "__main__":
    worker.main(load, "onnxruntime-genai")
