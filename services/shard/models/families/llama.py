"""Llama 2 and 3 (Touvron et al. 2023, Dubey et al. 2024), with the biases and the rope scaling that they may have."""

from __future__ import annotations

from typing import Any

from services.shard.models.architecture import (
    Architecture,
    LayerKind,
    LinearScaling,
    Llama3Scaling,
    Rotary,
)
from services.shard.models.fields import Fields

CLASS, MODEL_TYPE = "LlamaForCausalLM", "llama"


def read(fields: Fields) -> Architecture:
    """The architecture of a `config.json`; see `Fields` for what is raised."""
    fields.require("hidden_act", "silu")
    fields.require("pretraining_tp", 1, None)
    fields.require("sliding_window", None)
    sizes, attention_bias = fields.sizes(), fields.flag("attention_bias", False)
    return Architecture(
        family=MODEL_TYPE,
        **sizes._asdict(),
        layers=(LayerKind(fields.rotary()),) * fields.positive("num_hidden_layers"),
        attention_scale=sizes.head_size**-0.5,
        attention_bias=attention_bias,
        output_bias=attention_bias,
        feed_forward_bias=fields.flag("mlp_bias", False),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
    )


def write(architecture: Architecture) -> dict[str, Any]:
    """Inverse of `read`: the fields of a `config.json` that other tools load as LlamaForCausalLM."""
    rotary = architecture.layers[0].rotary
    return {
        "architectures": [CLASS],
        "model_type": MODEL_TYPE,
        "vocab_size": architecture.vocabulary_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.intermediate_size,
        "num_hidden_layers": architecture.layer_count,
        "num_attention_heads": architecture.head_count,
        "num_key_value_heads": architecture.kv_head_count,
        "head_dim": architecture.head_size,
        "max_position_embeddings": architecture.context_length,
        "rms_norm_eps": architecture.norm_epsilon,
        "rope_parameters": {"rope_theta": rotary.theta, **_scaling(rotary)},
        "rope_theta": rotary.theta,
        "tie_word_embeddings": architecture.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": architecture.attention_bias,
        "mlp_bias": architecture.feed_forward_bias,
        "dtype": "float32",
    }


def _scaling(rotary: Rotary) -> dict[str, Any]:
    match rotary.scaling:
        case None:
            return {"rope_type": "default"}
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, original):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }


def architecture(
    *,
    vocabulary_size: int,
    hidden_size: int,
    intermediate_size: int,
    layer_count: int,
    head_count: int,
    kv_head_count: int,
    head_size: int,
    context_length: int,
    norm_epsilon: float = 1e-6,
    rope_theta: float = 10000.0,
    tied_embeddings: bool = False,
) -> Architecture:
    """A Llama of these sizes with neither biases nor scaling, for whoever makes one; see `Architecture`."""
    return Architecture(
        family=MODEL_TYPE,
        vocabulary_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        head_count=head_count,
        kv_head_count=kv_head_count,
        head_size=head_size,
        context_length=context_length,
        layers=(LayerKind(Rotary(rope_theta)),) * layer_count,
        norm_epsilon=norm_epsilon,
        attention_scale=head_size**-0.5,
        tied_embeddings=tied_embeddings,
    )
