"""Mistral (Jiang et al. 2023): a Llama whose layers may all have a sliding window."""

from __future__ import annotations

from services.shard.models.architecture import Architecture, LayerKind
from services.shard.models.fields import Fields

CLASS, MODEL_TYPE = "MistralForCausalLM", "mistral"


def read(fields: Fields) -> Architecture:
    """The architecture of a `config.json`; see `Fields` for what is raised."""
    fields.require("hidden_act", "silu")
    fields.require("layer_types", None)  # Ministral has them, under a class of its own
    sizes = fields.sizes()
    return Architecture(
        family=MODEL_TYPE,
        **sizes._asdict(),
        layers=(LayerKind(fields.rotary(), fields.window(4096)),) * fields.positive("num_hidden_layers"),
        attention_scale=sizes.head_size**-0.5,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
    )
