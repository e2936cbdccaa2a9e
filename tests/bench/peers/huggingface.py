"""The worker of `transformers`: `generate` with its default, growing cache."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.peers import worker


def load(folder: Path, precision: str, threads: int) -> worker.Generate:
    """Loads a checkpoint in the dtype that the precision names."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], count: int) -> Sequence[Sequence[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
            )
        sequences: list[list[int]] = whole[:, ids.shape[1] :].tolist()
        return sequences

    return generate


if __name__ == "__main__":
    worker.main(load, "transformers")
