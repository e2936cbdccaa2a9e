"""What is read from a `config.json`, in every spelling, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3TextConfig, LlamaConfig

from services.config import BUILT_IN_MODEL
from services.shard.models.architecture import (
    Activation,
    Architecture,
    LayerKind,
    LinearScaling,
    Llama3Scaling,
    Rotary,
)
from services.shard.models.families import llama
from services.shard.models.registry import read_architecture
from tests.families import family_config, family_models
from tests.random_model import SMALL, small

LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1234.0,
    "rope_scaling": None,
    "torch_dtype": "float16",
}
"""As transformers 4 wrote it, before fields that came later."""


def of(name: str, **changes: Any) -> Architecture:
    """What is read from the configuration of `tests/families.py` with other fields; None takes a field away."""
    values = {**family_config(name).to_dict(), "architectures": None}
    values |= changes
    return read_architecture({field: value for field, value in values.items() if value is not None or field in changes})


def older(name: str, **changes: Any) -> Architecture:
    """Likewise without what transformers 5 writes of rotary embeddings and layers."""
    values = family_config(name).to_dict()
    for field in ("rope_parameters", "layer_types", "architectures"):
        values.pop(field, None)
    return read_architecture({**values, **changes})


def test_it_reads_what_it_writes_and_what_transformers_writes() -> None:
    other = small(kv_head_count=1, rope_theta=500000.0, norm_epsilon=1e-5)
    for shape in (SMALL, other, of("llama-biased"), of("llama-linear")):
        written = llama.write(shape)
        assert read_architecture(written) == shape
        assert read_architecture(LlamaConfig(**written).to_dict()) == shape


def test_the_built_in_model_is_read() -> None:
    shape = read_architecture(json.loads((Path(BUILT_IN_MODEL) / "config.json").read_text()))
    assert (shape.family, shape.layer_count, shape.tied_embeddings) == ("llama", 5, True)


def test_older_checkpoints_have_the_values_from_before_a_field_existed() -> None:
    shape = read_architecture(LLAMA_2)
    assert (shape.kv_head_count, shape.head_size, shape.layers[0].rotary) == (4, 6, Rotary(1234.0))
    assert not (shape.tied_embeddings or shape.attention_bias or shape.feed_forward_bias)
    assert read_architecture({**LLAMA_2, "architectures": None}) == shape


@pytest.mark.parametrize("name", [name for name, _ in family_models()])
def test_both_spellings_say_the_same(name: str) -> None:
    """Transformers 4 had `rope_theta` and `rope_scaling`, and no `layer_types`."""
    given = family_config(name).to_dict()["rope_parameters"]
    full = given.get("full_attention", given)
    fields: dict[str, Any] = {"rope_theta": full["rope_theta"]}
    if full["rope_type"] != "default":
        fields["rope_scaling"] = {part: value for part, value in full.items() if part != "rope_theta"}
        fields["rope_scaling"]["type"] = fields["rope_scaling"].pop("rope_type")
    if "sliding_attention" in given:
        fields["rope_local_base_freq"] = given["sliding_attention"]["rope_theta"]
    assert older(name, **fields) == of(name)


def test_rope_scaling() -> None:
    scaling = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}
    llama3 = older("llama", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    assert llama3.layers[0].rotary == Rotary(5e5, Llama3Scaling(8.0, 1.0, 4.0, 64))
    linear = older("llama", rope_scaling={"type": "linear", "factor": 2.0})
    assert linear.rotaries == (Rotary(10000.0, LinearScaling(2.0)),)


def test_biases() -> None:
    def biases(shape: Architecture) -> tuple[bool, bool, bool]:
        return shape.attention_bias, shape.output_bias, shape.feed_forward_bias

    assert biases(of("llama", attention_bias=True)) == (True, True, False)
    assert biases(of("llama", mlp_bias=True)) == (False, False, True)
    assert biases(of("qwen2")) == (True, False, False)
    assert biases(of("qwen3", attention_bias=True)) == (True, True, False)
    assert biases(of("mistral")) == (False, False, False)


def test_windows() -> None:
    def windows(shape: Architecture) -> list[int | None]:
        return [kind.window for kind in shape.layers]

    assert windows(of("mistral")) == [40, 40, 40]
    assert windows(of("mistral", sliding_window=None)) == [None, None, None]
    assert windows(older("qwen2", use_sliding_window=False, sliding_window=9, max_window_layers=0)) == [None] * 3
    assert windows(older("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=2)) == [None, None, 9]
    assert windows(older("qwen3", use_sliding_window=True, sliding_window=9, max_window_layers=0)) == [9, 9, 9]
    mixed = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(of("qwen3", use_sliding_window=True, sliding_window=9, layer_types=mixed)) == [9, None, 9]
    assert windows(older("gemma2")) == [32, None, 32, None]
    assert windows(older("gemma3")) == [24] * 5 + [None]
    assert windows(older("gemma3", sliding_window_pattern=2)) == [24, None] * 3


def test_gemma() -> None:
    second, third = of("gemma2"), of("gemma3")
    for shape in (second, third):
        assert (shape.norm_offset, shape.post_norms, shape.activation) == (1.0, True, Activation.GELU_TANH)
        assert (shape.embedding_scale, shape.tied_embeddings) == (8.0, True)
    assert (second.attention_softcap, second.logit_softcap, second.query_key_norm) == (50.0, 30.0, False)
    assert (third.attention_softcap, third.logit_softcap, third.query_key_norm) == (None, None, True)
    assert second.attention_scale == 24**-0.5
    assert third.layers[5] == LayerKind(Rotary(50000.0, LinearScaling(8.0)))
    assert third.layers[0] == LayerKind(Rotary(1000.0), 24)
    bare = older("gemma3", tie_word_embeddings=None)
    assert bare.rotaries == (Rotary(10000.0), Rotary(1000000.0))
    assert bare.tied_embeddings
    assert of("gemma2", attn_logit_softcapping=None).attention_softcap is None


def test_a_configuration_without_a_class_is_read_by_its_type() -> None:
    assert [of(name).family for name, _ in family_models()] == [config.model_type for _, config in family_models()]


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama", "architectures", ["PhiForCausalLM"]),
        ("llama", "architectures", ["LlamaForCausalLM", "MistralForCausalLM"]),
        ("gemma3", "architectures", ["Gemma3ForConditionalGeneration"]),
        ("llama", "model_type", "phi"),
        ("llama", "model_type", ["llama"]),
        ("llama", "hidden_act", "gelu"),
        ("llama", "attention_bias", "yes"),
        ("llama", "pretraining_tp", 2),
        ("llama", "quantization_config", {"bits": 4}),
        ("llama", "sliding_window", 128),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}),  # rope_parameters say otherwise
        ("llama", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("llama", "rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0}),
        ("llama", "rope_parameters", {"rope_type": "longrope", "rope_theta": 10000.0}),
        ("llama", "rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0}),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        ("llama", "rope_parameters", "default"),
        ("llama", "num_key_value_heads", 3),
        ("llama", "num_hidden_layers", 0),
        ("llama", "hidden_size", "48"),
        ("llama", "vocab_size", True),
        ("llama", "head_dim", 7),
        ("llama", "rms_norm_eps", -1.0),
        ("llama", "max_position_embeddings", None),
        ("llama", "tie_word_embeddings", "yes"),
        ("mistral", "layer_types", ["full_attention"] * 3),
        ("mistral", "sliding_window", 0),
        ("qwen2", "hidden_act", "relu"),
        ("qwen2", "sliding_window", None),  # with layers that need one
        ("qwen2", "layer_types", ["full_attention"]),
        ("qwen2", "layer_types", ["chunked_attention"] * 3),
        ("qwen3", "use_sliding_window", 1),
        ("gemma2", "hidden_activation", "gelu"),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma2", "query_pre_attn_scalar", 0),
        ("gemma2", "final_logit_softcapping", "30"),
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("gemma3", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
        ("gemma3", "rope_parameters", {"full_attention": {"rope_type": "yarn"}}),
    ],
)
def test_what_is_not_served_is_refused_by_name(name: str, field: str, value: Any) -> None:
    changes = {field: value}
    if name == "qwen2":
        changes = {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 3, "sliding_window": 8, **changes}
    of(name)
    with pytest.raises(ValueError, match=f"^{field}: "):
        of(name, **changes)


@pytest.mark.parametrize("missing", ["factor", "low_freq_factor", "original_max_position_embeddings"])
def test_what_llama3_scaling_lacks_is_named(missing: str) -> None:
    parts = dict(family_config("llama-biased").to_dict()["rope_parameters"])
    del parts[missing]
    with pytest.raises(ValueError, match=f"^rope_parameters: {missing}: "):
        of("llama-biased", rope_parameters=parts)


def test_gemma3_has_to_say_its_types() -> None:
    shape = Gemma3TextConfig(**{**family_config("gemma3").to_dict(), "layer_types": None})
    assert read_architecture(shape.to_dict()) == of("gemma3")
