"""Weights from disk: safetensors files and a `config.json`, in the folder of a model.

Nothing is executed: no pickles, no code of the model's author. Knows no batch and no kernel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.shard.kernels.quantize import dequantize_rows, quantize_rows
from services.shard.models.architecture import Architecture
from services.shard.models.registry import read_architecture
from services.shard.models.transformer import Transformer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_STORED_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
_NAMED_DTYPES = ("auto", "float32", "bfloat16", "int8")


def load_architecture(folder: Path) -> Architecture:
    """Reads `config.json`.

    Raises:
        ValueError: it is missing, not JSON, or describes what is not served.
    """
    return read_architecture(_read_json(folder, "config.json"))


def resolve_dtype(folder: Path, dtype: str) -> str:
    """What the linear layers compute in: "float32", "bfloat16" or "int8".

    Args:
        folder: of the model.
        dtype: one of these, or "auto": bfloat16 where all matrices are stored so, float32 else.

    Raises:
        ValueError: it is none of these, or a file is missing.
    """
    if dtype not in _NAMED_DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not served, only one of {', '.join(_NAMED_DTYPES)}")
    if dtype != "auto":
        return dtype
    return "bfloat16" if _matrix_dtypes(folder) == {"BF16"} else "float32"


def load_model(folder: Path, dtype: str = "auto") -> Transformer:
    """Loads a model.

    Args:
        folder: of the model.
        dtype: see `resolve_dtype`. With int8 the linear layers, the head among them, hold the float32 values that
            `quantize_rows` leaves of them, and the embedding is as it was: the reference of kernels that multiply
            integers.

    Raises:
        ValueError: a file or tensor is missing, unknown, or of another shape or dtype than the configuration says.
    """
    architecture, dtype = load_architecture(folder), resolve_dtype(folder, dtype)
    model = Transformer(architecture, torch.bfloat16 if dtype == "bfloat16" else torch.float32).requires_grad_(False)
    views = model.checkpoint_views()
    loaded: set[str] = set()
    for name, tensor in _read_tensors(folder):
        if name.endswith("rotary_emb.inv_freq"):
            continue  # older checkpoints store what follows from rope_theta
        if name in loaded:
            raise ValueError(f"tensor {name} is there twice")
        if name == "lm_head.weight" and architecture.tied_embeddings:
            _check_tied(tensor, folder)
            continue
        if name not in views:
            raise ValueError(f"tensor {name} is not part of this architecture")
        if tensor.shape != views[name].shape:
            raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, not {tuple(views[name].shape)}")
        views[name].copy_(tensor)
        loaded.add(name)
    missing = sorted(views.keys() - loaded)
    if missing:
        raise ValueError(f"tensor {missing[0]} is missing" + (f" and {len(missing) - 1} more" * (len(missing) > 1)))
    for norm in model.norms().values():
        norm.add_(architecture.norm_offset)
    if dtype == "int8":
        model.map_linear_weights(lambda weight: dequantize_rows(*quantize_rows(weight)))
    return model


def stored_bytes(folder: Path) -> int:
    """Size of all weight files.

    Raises:
        ValueError: a file is missing.
    """
    return sum(path.stat().st_size for path in _weight_files(folder))


def hash_weights(folder: Path) -> str:
    """SHA-256 of the configuration and of all weight files with their names: part of the fingerprint (R20).

    Raises:
        ValueError: a file is missing.
    """
    digest = hashlib.sha256(repr(load_architecture(folder)).encode())
    for path in _weight_files(folder):
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    """The weight files, sorted by name: those of the index, or the single one."""
    names = [SINGLE_FILE]
    if (folder / INDEX_FILE).exists():
        weight_map = _read_json(folder, INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
            raise ValueError(f"{INDEX_FILE}: weight_map must give a file of the folder for each tensor")
        names = sorted(set(weight_map.values()))
    return [_inside(folder, name) for name in names]


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name == PurePath(name).name and name.endswith(".safetensors")


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder. Links may not lead out of it, except to where the hub's cache keeps its files.

    Raises:
        ValueError: there is no such file, or it is elsewhere.
    """
    path, root = (folder / name).resolve(), folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not path.is_relative_to(root) and not path.is_relative_to(blobs):
        raise ValueError(f"{name}: leads out of the model's folder")
    if not path.is_file():
        raise ValueError(f"{name}: no such file in {folder}")
    return folder / name


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads(_inside(folder, name).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name}: an object was expected")
    return values


def _open_files(folder: Path) -> Iterator[Any]:
    """Every weight file, open."""
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise ValueError(f"{path.name}: not a safetensors file: {error}") from error


def _matrix_dtypes(folder: Path) -> set[str]:
    """Safetensors' names of the dtypes in which matrices are stored."""
    dtypes = set()
    for file in _open_files(folder):
        parts = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (no mapping, only has this method)
        dtypes |= {part.get_dtype() for part in parts if len(part.get_shape()) > 1}
    return dtypes


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, one at a time."""
    for file in _open_files(folder):
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            if tensor.dtype not in _STORED_DTYPES:
                raise ValueError(f"tensor {name} has dtype {tensor.dtype}, which is not served")
            yield name, tensor


def _check_tied(head: Tensor, folder: Path) -> None:
    """A tied head that is stored all the same must be the embedding; otherwise the configuration is wrong."""
    for name, tensor in _read_tensors(folder):
        if name == "model.embed_tokens.weight" and torch.equal(tensor, head):
            return
    raise ValueError("tie_word_embeddings: the checkpoint has a head that differs from its embedding")
