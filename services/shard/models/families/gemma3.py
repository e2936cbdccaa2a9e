"""Gemma 3 (Gemma Team 2025), models of text alone: windows in five of six layers, which turn by another base.

The checkpoints that also see images (`Gemma3ForConditionalGeneration`) are refused by their class: a part of their
tensors would have to be passed over.
"""

from __future__ import annotations

from services.shard.models.architecture import Activation, Architecture, LayerKind
from services.shard.models.fields import FULL, SLIDING, Fields

CLASS, MODEL_TYPE = "Gemma3ForCausalLM", "gemma3_text"


def read(fields: Fields) -> Architecture:
    """The architecture of a `config.json`; see `Fields` for what is raised."""
    fields.require("hidden_activation", "gelu_pytorch_tanh")
    fields.require("use_bidirectional_attention", False, None)
    fields.require("attn_logit_softcapping", None)  # that of Gemma 2; transformers reads it and does not compute it
    sizes, attention_bias = fields.sizes(head_size=256), fields.flag("attention_bias", False)
    return Architecture(
        family=MODEL_TYPE,
        **sizes._asdict(),
        layers=_layers(fields),
        attention_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_bias=attention_bias,
        output_bias=attention_bias,
        query_key_norm=True,
        post_norms=True,
        norm_offset=1.0,
        activation=Activation.GELU_TANH,
        logit_softcap=fields.optional_number("final_logit_softcapping", None),
        embedding_scale=sizes.hidden_size**0.5,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
    )


def _layers(fields: Fields) -> tuple[LayerKind, ...]:
    count, pattern = fields.positive("num_hidden_layers"), fields.positive("sliding_window_pattern", 6)
    types = [SLIDING if (layer + 1) % pattern else FULL for layer in range(count)]
    rotaries = fields.rotary_by_type({FULL: ("rope_theta", 1_000_000.0), SLIDING: ("rope_local_base_freq", 10_000.0)})
    return fields.layers(types, fields.window(4096), rotaries)
