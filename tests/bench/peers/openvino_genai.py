"""The worker of OpenVINO GenAI: its continuous batching pipeline.

`bf16` and `fp32` are the precision of the arithmetic; the weights of both are float16 in the file. Keys and values are
kept as the library does by default, in 8 bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.peers import worker

MOST_SEQUENCES = 64


def load(folder: Path, precision: str, threads: int) -> worker.Generate:
    """Loads a folder that `optimum-cli export openvino` wrote."""
    genai: Any = importlib.import_module("openvino_genai")
    openvino: Any = importlib.import_module("openvino")
    numpy: Any = importlib.import_module("numpy")
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = MOST_SEQUENCES
    scheduler.max_num_batched_tokens = 4096
    scheduler.cache_size = 1  # GB
    scheduler.enable_prefix_caching = False
    properties = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "bf16",
    }
    pipeline = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)

    def generate(prompts: list[list[int]], count: int) -> Sequence[Sequence[int]]:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos = True
        config.do_sample = False
        inputs = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts]
        results = pipeline.generate(inputs, [config] * len(prompts))
        return [result.m_generation_ids[0] for result in results]

    return generate


if __name__ == "__main__":
    worker.main(load, "openvino-genai")
