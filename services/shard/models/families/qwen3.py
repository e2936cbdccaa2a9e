"""Qwen3 (Yang et al. 2025): a Qwen2 with normalised queries and keys instead of their biases."""

from __future__ import annotations

from services.shard.models.architecture import Architecture
from services.shard.models.families.qwen2 import layers
from services.shard.models.fields import Fields

CLASS, MODEL_TYPE = "Qwen3ForCausalLM", "qwen3"


def read(fields: Fields) -> Architecture:
    """The architecture of a `config.json`; see `Fields` for what is raised."""
    fields.require("hidden_act", "silu")
    sizes, attention_bias = fields.sizes(head_size=128), fields.flag("attention_bias", False)
    return Architecture(
        family=MODEL_TYPE,
        **sizes._asdict(),
        layers=layers(fields),
        attention_scale=sizes.head_size**-0.5,
        attention_bias=attention_bias,
        output_bias=attention_bias,
        query_key_norm=True,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
    )
