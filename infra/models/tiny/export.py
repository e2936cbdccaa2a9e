"""Writes a trained model as a folder that Hugging Face's tools and Fermata's shard load.

Weights are stored in bfloat16, which float32 holds exactly, so everyone who loads them computes with the same numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from infra.models.tiny import tokenizer as tiny_tokenizer
from services.shard.models.architecture import Architecture
from services.shard.models.families import llama
from services.shard.models.transformer import Transformer

TEMPERATURE, TOP_P = 0.7, 0.95
"""What is sampled with where a request says nothing."""


def round_weights(model: Transformer) -> None:
    """Rounds the weights in place to what is stored."""
    for view in model.checkpoint_views().values():
        view.copy_(view.to(torch.bfloat16))


def write_folder(folder: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Writes weights, configuration, tokenizer and generation settings, replacing those of an earlier model."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, tokenizer, model.architecture)
    weights = {name: weight.to("cpu", torch.bfloat16) for name, weight in model.to_checkpoint().items()}
    # Written aside and moved, so that whoever loads meanwhile sees the old file or the new one.
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")


def write_tokenizer(folder: Path, tokenizer: Tokenizer, shape: Architecture) -> None:
    """Writes everything but the weights."""
    end_of_text, _, turn_end = (tiny_tokenizer.control_id(tokenizer, token) for token in tiny_tokenizer.CONTROL_TOKENS)
    special_ids = {"bos_token_id": end_of_text, "eos_token_id": turn_end, "pad_token_id": end_of_text}
    _write_json(folder / "config.json", llama.write(shape) | special_ids | {"dtype": "bfloat16"})
    _write_json(
        folder / "generation_config.json",
        special_ids
        | {"eos_token_id": [turn_end, end_of_text], "do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P},
    )
    _write_json(folder / "tokenizer_config.json", tiny_tokenizer.configuration(shape.context_length))
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
