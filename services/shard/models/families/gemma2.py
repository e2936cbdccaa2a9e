"""Gemma 2 (Gemma Team 2024): soft caps, norms on both sides of each block, every other layer with a sliding window."""

from __future__ import annotations

from services.shard.models.architecture import Activation, Architecture
from services.shard.models.fields import FULL, SLIDING, Fields

CLASS, MODEL_TYPE = "Gemma2ForCausalLM", "gemma2"


def read(fields: Fields) -> Architecture:
    """The architecture of a `config.json`; see `Fields` for what is raised."""
    fields.require("hidden_activation", "gelu_pytorch_tanh")
    fields.require("use_bidirectional_attention", None, False)
    sizes, attention_bias = fields.sizes(head_size=256), fields.flag("attention_bias", False)
    rotary = fields.rotary()
    types = [FULL if layer % 2 else SLIDING for layer in range(fields.positive("num_hidden_layers"))]
    return Architecture(
        family=MODEL_TYPE,
        **sizes._asdict(),
        layers=fields.layers(types, fields.window(4096), {FULL: rotary, SLIDING: rotary}),
        attention_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_bias=attention_bias,
        output_bias=attention_bias,
        post_norms=True,
        norm_offset=1.0,
        activation=Activation.GELU_TANH,
        attention_softcap=fields.optional_number("attn_logit_softcapping", 50.0),
        logit_softcap=fields.optional_number("final_logit_softcapping", 30.0),
        embedding_scale=sizes.hidden_size**0.5,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
    )
