"""Which family reads a `config.json`. Knows no tensor and no file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from services.shard.models.architecture import Architecture
from services.shard.models.families import gemma2, gemma3, llama, mistral, qwen2, qwen3
from services.shard.models.fields import Fields


class _Family(Protocol):
    """A module of `families/`: the class and the type by which a `config.json` names it, and its reader."""

    CLASS: str
    MODEL_TYPE: str

    def read(self, fields: Fields) -> Architecture: ...


_FAMILIES: tuple[_Family, ...] = (llama, mistral, qwen2, qwen3, gemma2, gemma3)
_BY_CLASS = {family.CLASS: family for family in _FAMILIES}
_BY_TYPE = {family.MODEL_TYPE: family for family in _FAMILIES}


def read_architecture(values: Mapping[str, Any]) -> Architecture:
    """Reads the content of a `config.json`.

    Raises:
        ValueError: a field is missing, or asks for what is not served; the message begins with its name.
    """
    classes, model_type = values.get("architectures"), values.get("model_type")
    if classes:
        if not isinstance(classes, list) or len(classes) != 1 or classes[0] not in _BY_CLASS:
            raise ValueError(f"architectures: {classes!r} is not served, only one of {', '.join(_BY_CLASS)}")
        family = _BY_CLASS[classes[0]]
        if model_type not in (None, family.MODEL_TYPE):
            raise ValueError(f"model_type: {model_type!r} does not go with {family.CLASS}")
    elif isinstance(model_type, str) and model_type in _BY_TYPE:
        family = _BY_TYPE[model_type]
    else:
        raise ValueError(f"model_type: {model_type!r} is not served, only one of {', '.join(_BY_TYPE)}")
    return family.read(Fields(values))
