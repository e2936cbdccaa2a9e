"""The shape of a Llama model, from and to the `config.json` that Hugging Face writes.

Whatever the code beside does not compute is refused here by the name of its field, so that no model is served wrong.
Knows no tensor and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MUST_BE: dict[str, tuple[object, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
    "sliding_window": (None,),
}
"""Fields that change what is computed, with the values that are served. A missing field has the first of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Sizes of a Llama model (Touvron et al. 2023) with grouped-query attention (Ainslie et al. 2023).

    Attributes:
        vocabulary_size: number of token ids, V.
        hidden_size: width of the residual stream, H.
        intermediate_size: width inside the feed-forward block, I.
        layer_count: number of layers.
        head_count: query heads.
        kv_head_count: key and value heads; divides `head_count`.
        head_size: width of one head, D; even.
        context_length: positions that the model knows.
        norm_epsilon: added to the mean square in RMSNorm.
        rope_theta: base of the rotary frequencies.
        tied_embeddings: the head uses the embedding's matrix.
    """

    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    layer_count: int
    head_count: int
    kv_head_count: int
    head_size: int
    context_length: int
    norm_epsilon: float = 1e-6
    rope_theta: float = 10000.0
    tied_embeddings: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlamaConfig:
        """Reads the content of a `config.json`.

        Raises:
            ValueError: a field is missing, or asks for what is not served; the message names it.
        """
        architectures = values.get("architectures") or ["LlamaForCausalLM"]
        if architectures != ["LlamaForCausalLM"]:
            raise ValueError(f"architectures: {architectures!r} is not served, only ['LlamaForCausalLM']")
        for name, accepted in _MUST_BE.items():
            value = values.get(name, accepted[0])
            if value not in accepted:
                raise ValueError(f"{name}: {value!r} is not served, only {' or '.join(map(repr, accepted))}")
        hidden_size, head_count = _positive(values, "hidden_size"), _positive(values, "num_attention_heads")
        config = cls(
            vocabulary_size=_positive(values, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(values, "intermediate_size"),
            layer_count=_positive(values, "num_hidden_layers"),
            head_count=head_count,
            kv_head_count=_positive(values, "num_key_value_heads", head_count),
            head_size=_positive(values, "head_dim", hidden_size // head_count),
            context_length=_positive(values, "max_position_embeddings"),
            norm_epsilon=_number(values, "rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(values),
            tied_embeddings=values.get("tie_word_embeddings", False),
        )
        if not isinstance(config.tied_embeddings, bool):
            raise ValueError(f"tie_word_embeddings: true or false was expected, not {config.tied_embeddings!r}")
        if head_count % config.kv_head_count:
            raise ValueError(f"num_key_value_heads: {config.kv_head_count} does not divide {head_count} heads")
        if config.head_size % 2:
            raise ValueError(f"head_dim: {config.head_size} is odd; rotary embeddings turn pairs")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Inverse of `from_dict`: the fields of a `config.json` that other tools load as LlamaForCausalLM."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layer_count,
            "num_attention_heads": self.head_count,
            "num_key_value_heads": self.kv_head_count,
            "head_dim": self.head_size,
            "max_position_embeddings": self.context_length,
            "rms_norm_eps": self.norm_epsilon,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": "float32",
        }


def _rope_theta(values: Mapping[str, Any]) -> float:
    """Base of the rotary frequencies, from `rope_parameters` (transformers 5) or from the older fields."""
    theta: float | None = None
    for name in ("rope_scaling", "rope_parameters"):
        given = values.get(name)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise ValueError(f"{name}: an object was expected, not {given!r}")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{name}: rope_type {kind!r} is not served, only 'default'")
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"{name}: partial_rotary_factor must be 1")
        if "rope_theta" in given:
            theta = _number(given, "rope_theta", 0.0)
    return _number(values, "rope_theta", 10000.0) if theta is None else theta


def _positive(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer; null is as good as missing."""
    value = values.get(name)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{name}: missing")
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name}: a positive integer was expected, not {value!r}")
    return value


def _number(values: Mapping[str, Any], name: str, default: float) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name}: a positive number was expected, not {value!r}")
    return float(value)
