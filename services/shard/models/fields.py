"""Reads the fields of a `config.json`, whichever version of transformers wrote it.

Every refusal is a ValueError that begins with the field's name, so that no model is served wrong and its owner knows
why. Knows no family: which fields there are, and what they mean, is said in `families/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from services.shard.models.architecture import LayerKind, LinearScaling, Llama3Scaling, Rotary

FULL, SLIDING = "full_attention", "sliding_attention"
"""The values of `layer_types`."""


class Sizes(NamedTuple):
    """What every family has, under the names of `Architecture`."""

    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    head_count: int
    kv_head_count: int
    head_size: int
    context_length: int
    norm_epsilon: float


class Fields:
    """The content of a `config.json`; null is as good as missing, unless a method says otherwise."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def require(self, name: str, *accepted: object) -> None:
        """Refuses any value but these; a missing field has the first of them."""
        value = self._values.get(name, accepted[0])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
            raise ValueError(f"{name}: {value!r} is not served, only {' or '.join(map(repr, accepted))}")

    def positive(self, name: str, default: int | None = None) -> int:
        """A positive integer; without a default it must be there."""
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{name}: missing")
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ValueError(f"{name}: a positive integer was expected, not {value!r}")
        return value

    def count(self, name: str, default: int) -> int:
        """An integer that is not negative."""
        return 0 if self._values.get(name) == 0 else self.positive(name, default)

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self._values.get(name)
        return _number(name, default if value is None else value)

    def optional_number(self, name: str, default: float | None) -> float | None:
        """A positive number, or None where the field is null."""
        value = self._values.get(name, default)
        return None if value is None else _number(name, value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ValueError(f"{name}: true or false was expected, not {value!r}")
        return value

    def window(self, default: int) -> int | None:
        """`sliding_window`; None where it is null."""
        return None if self._values.get("sliding_window", default) is None else self.positive("sliding_window", default)

    def sizes(self, *, head_size: int | None = None) -> Sizes:
        """The sizes of the model; refuses the fields that change in every family what is computed.

        Args:
            head_size: of a model that does not say `head_dim`; None divides the hidden size by the heads.
        """
        self.require("partial_rotary_factor", 1.0, None)
        self.require("quantization_config", None)
        hidden_size, head_count = self.positive("hidden_size"), self.positive("num_attention_heads")
        sizes = Sizes(
            vocabulary_size=self.positive("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=self.positive("intermediate_size"),
            head_count=head_count,
            kv_head_count=self.positive("num_key_value_heads", head_count),
            head_size=self.positive("head_dim", head_size or hidden_size // head_count),
            context_length=self.positive("max_position_embeddings"),
            norm_epsilon=self.number("rms_norm_eps", 1e-6),
        )
        if head_count % sizes.kv_head_count:
            raise ValueError(f"num_key_value_heads: {sizes.kv_head_count} does not divide {head_count} heads")
        if sizes.head_size % 2:
            raise ValueError(f"head_dim: {sizes.head_size} is odd; rotary embeddings turn pairs")
        return sizes

    def layers(self, types: Sequence[str], window: int | None, rotaries: Mapping[str, Rotary]) -> tuple[LayerKind, ...]:
        """The kind of each layer.

        Args:
            types: `FULL` or `SLIDING` for each layer of a model that does not say `layer_types`.
            window: of the layers that are `SLIDING`.
            rotaries: by type.
        """
        given = self._values.get("layer_types")
        if given is None:
            given = types
        elif not isinstance(given, list) or not all(kind in (FULL, SLIDING) for kind in given):
            raise ValueError(f"layer_types: a list of {FULL!r} and {SLIDING!r} was expected, not {given!r}")
        if len(given) != len(types):
            raise ValueError(f"layer_types: {len(given)} entries for {len(types)} layers")
        if window is None and SLIDING in given:
            raise ValueError(f"sliding_window: none is used, but layers are {SLIDING!r}")
        return tuple(LayerKind(rotaries[kind], window if kind == SLIDING else None) for kind in given)

    def rotary(self, default_theta: float = 10000.0) -> Rotary:
        """Of all layers: from `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling`."""
        theta = self.number("rope_theta", default_theta)
        given = {name: self._values.get(name) for name in ("rope_scaling", "rope_parameters")}
        found = [_rotary(name, _mapping(name, part), theta) for name, part in given.items() if part is not None]
        if len(set(found)) > 1:
            raise ValueError("rope_scaling: says something else than rope_parameters")
        return found[0] if found else Rotary(theta)

    def rotary_by_type(self, thetas: Mapping[str, tuple[str, float]]) -> dict[str, Rotary]:
        """Of the layers of each type: from `rope_parameters`, or from older fields, where scaling is for `FULL` alone.

        Args:
            thetas: by type the older field's name and its default.
        """
        found = {kind: Rotary(self.number(name, default)) for kind, (name, default) in thetas.items()}
        if (scaling := self._values.get("rope_scaling")) is not None:
            found[FULL] = _rotary("rope_scaling", _mapping("rope_scaling", scaling), found[FULL].theta)
        if (parameters := self._values.get("rope_parameters")) is not None:
            by_type = _mapping("rope_parameters", parameters)
            if unknown := by_type.keys() - thetas.keys():
                raise ValueError(f"rope_parameters: {min(unknown)!r} is not a type of layer")
            for kind, given in by_type.items():
                if given is not None:
                    found[kind] = _rotary("rope_parameters", _mapping("rope_parameters", given), found[kind].theta)
        return found


def _rotary(name: str, given: Mapping[str, Any], theta: float) -> Rotary:
    """One object of rotary parameters; `theta` is what it has if it does not say."""
    scaling: LinearScaling | Llama3Scaling | None
    kind = given.get("rope_type", given.get("type", "default"))
    if given.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(f"{name}: partial_rotary_factor must be 1")
    theta = _part(name, given, "rope_theta", theta)
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = LinearScaling(_part(name, given, "factor"))
    elif kind == "llama3":
        original = given.get("original_max_position_embeddings")
        if isinstance(original, bool) or not isinstance(original, int) or original <= 0:
            raise ValueError(f"{name}: original_max_position_embeddings: a positive integer, not {original!r}")
        low, high = _part(name, given, "low_freq_factor"), _part(name, given, "high_freq_factor")
        if low >= high:
            raise ValueError(f"{name}: low_freq_factor {low} is not below high_freq_factor {high}")
        scaling = Llama3Scaling(_part(name, given, "factor"), low, high, original)
    else:
        raise ValueError(f"{name}: rope_type {kind!r} is not served, only 'default', 'linear' or 'llama3'")
    return Rotary(theta, scaling)


def _part(name: str, given: Mapping[str, Any], part: str, default: float | None = None) -> float:
    """A positive number inside the object of a field."""
    return _number(f"{name}: {part}", given.get(part, default))


def _mapping(name: str, given: object) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}: an object was expected, not {given!r}")
    return given


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: a positive number was expected, not {value!r}")
    return float(value)
