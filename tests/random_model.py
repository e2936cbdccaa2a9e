"""Small models with random weights, written as Hugging Face checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from services.config import BUILT_IN_MODEL
from services.shard.models.architecture import Architecture
from services.shard.models.families import llama
from services.shard.models.registry import read_architecture
from services.shard.models.transformer import Transformer

_SMALL = {
    "vocabulary_size": 211,
    "hidden_size": 48,
    "intermediate_size": 100,
    "layer_count": 2,
    "head_count": 4,
    "kv_head_count": 2,
    "head_size": 16,
    "context_length": 512,
}


def small(**changes: Any) -> Architecture:
    """A small Llama; `changes` are arguments of `llama.architecture`."""
    return llama.architecture(**{**_SMALL, **changes})


SMALL = small()


def random_model(shape: Architecture = SMALL, seed: int = 1) -> Transformer:
    """A model whose attention is neither flat nor peaked and whose norms are not all one."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(shape).initialise(generator)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.data.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5, generator=generator)
    return model


def write_model(folder: Path, model: Transformer, **changes: Any) -> Path:
    """Writes a checkpoint; `changes` are fields of its `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.to_checkpoint(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**llama.write(model.architecture), **changes}))
    return folder


def write_serving_model(folder: Path) -> Path:
    """Random weights of the built-in model's shape, with its tokenizer: a model that says much and means nothing.

    Tests of the line use it, so that nothing depends on what the built-in model was taught to say.
    """
    built_in = Path(BUILT_IN_MODEL)
    shape = read_architecture(json.loads((built_in / "config.json").read_text()))
    write_model(folder, random_model(shape))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(built_in / name, folder)
    return folder
