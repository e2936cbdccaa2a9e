"""Qwen2 and Qwen2.5 (Yang et al. 2024): biases of query, key and value; the upper layers may have a sliding window."""

from __future__ import annotations

from services.shard.models.architecture import Architecture, LayerKind
from services.shard.models.fields import FULL, SLIDING, Fields

CLASS, MODEL_TYPE = "Qwen2ForCausalLM", "qwen2"


def read(fields: Fields) -> Architecture:
    """The architecture of a `config.json`; see `Fields` for what is raised."""
    fields.require("hidden_act", "silu")
    sizes = fields.sizes()
    return Architecture(
        family=MODEL_TYPE,
        **sizes._asdict(),
        layers=layers(fields),
        attention_scale=sizes.head_size**-0.5,
        attention_bias=True,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
    )


def layers(fields: Fields) -> tuple[LayerKind, ...]:
    """The layers' windows: those of `layer_types`, else from `max_window_layers` up, if they are used at all."""
    rotary, count = fields.rotary(), fields.positive("num_hidden_layers")
    window = fields.window(4096) if fields.flag("use_sliding_window", False) else None
    first = count if window is None else fields.count("max_window_layers", 28)
    types = [SLIDING if layer >= first else FULL for layer in range(count)]
    return fields.layers(types, window, {FULL: rotary, SLIDING: rotary})
