"""A small random model of each family that is served, made and written by transformers.

Whoever computes is held to what transformers computes with it. The weights are drawn so that attention is neither flat
nor peaked, layers count as much as the embedding, and logits have a standard deviation of about three.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}

_FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-biased": (
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": _LLAMA3},
    ),
    "llama-linear": (LlamaConfig, {"num_key_value_heads": 4, "rope_parameters": _LINEAR}),
    "mistral": (MistralConfig, {"sliding_window": 40, "head_dim": 24}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-windows": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": (
        Gemma2Config,
        {"num_hidden_layers": 4, "sliding_window": 32, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            "num_hidden_layers": 6,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "sliding_window": 24,
            "query_pre_attn_scalar": 48,
            "rope_parameters": _GEMMA3_ROPE,
            "tie_word_embeddings": True,
        },
    ),
}
_LOGIT_DEVIATION = 3.0


def family_models() -> Iterator[tuple[str, PretrainedConfig]]:
    """Name and configuration of each model."""
    for name in _FAMILIES:
        yield name, family_config(name)


def family_config(name: str, **changes: Any) -> PretrainedConfig:
    """The configuration of one of them; `changes` are fields of it."""
    kind, fields = _FAMILIES[name]
    return kind(**{**_SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **fields, **changes})


def write_family(
    folder: Path, name: str, *, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", **changes: Any
) -> Path:
    """Writes `config.json` and the weights as transformers does.

    Args:
        folder: is created.
        name: one of `family_models`.
        dtype: of the stored weights.
        shard_size: most bytes of one file.
        changes: fields of the configuration.
    """
    of_config: Any = AutoModelForCausalLM.from_config
    model = of_config(family_config(name, **changes), attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    gemma = "gemma" in name
    for parameter_name, parameter in model.named_parameters():
        if gemma and "post_" in parameter_name:
            parameter.data.uniform_(1.0, 2.5, generator=generator)  # against an embedding that is scaled
        elif "norm" in parameter_name:
            parameter.data.uniform_(0.5 - gemma, 1.5 - gemma, generator=generator)  # Gemma adds one
        elif parameter.dim() == 1:
            parameter.data.normal_(0.0, 0.3, generator=generator)
        else:
            outside = "embed" in parameter_name or "lm_head" in parameter_name
            gain = _LOGIT_DEVIATION if outside else 1.5
            parameter.data.normal_(0.0, gain * parameter.shape[1] ** -0.5, generator=generator)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def open_family(folder: Path, dtype: torch.dtype) -> Any:
    """The model of a folder as transformers computes it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()
