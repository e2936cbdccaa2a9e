"""Checkpoints that are loaded, and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from services.common import model_folder
from services.shard import weights
from services.shard.kernels.quantize import dequantize_rows, quantize_rows
from tests.random_model import random_model, small, write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", random_model())


def change(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Rewrites a checkpoint; None leaves a tensor out."""
    tensors = {**load_file(folder / weights.SINGLE_FILE), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / weights.SINGLE_FILE)


def split(folder: Path, files: int) -> None:
    """Turns a single file into shards with an index."""
    tensors = load_file(folder / weights.SINGLE_FILE)
    (folder / weights.SINGLE_FILE).unlink()
    names = [f"model-{index + 1:05}-of-{files:05}.safetensors" for index in range(files)]
    weight_map = {name: names[index % files] for index, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / weights.INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_single_file_and_shards_load_alike(folder: Path) -> None:
    expected = random_model().to_checkpoint()
    for files in (1, 3):
        if files > 1:
            split(folder, files)
        loaded = weights.load_model(folder).to_checkpoint()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("stored", "dtype", "loaded_as"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.float16, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float16, "bfloat16", torch.bfloat16),
    ],
)
def test_dtypes(folder: Path, stored: torch.dtype, dtype: str, loaded_as: torch.dtype) -> None:
    """As stored, float16 apart, or as asked; norms are float32 always."""
    rounded = {name: tensor.to(stored) for name, tensor in load_file(folder / weights.SINGLE_FILE).items()}
    change(folder, dict(rounded))
    assert str(loaded_as) == f"torch.{weights.resolve_dtype(folder, dtype)}"
    for name, tensor in weights.load_model(folder, dtype).to_checkpoint().items():
        expected = rounded[name].to(torch.float32 if "norm" in name else loaded_as)
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


def test_norms_in_float32_do_not_change_what_is_computed_in(folder: Path) -> None:
    tensors = load_file(folder / weights.SINGLE_FILE)
    change(folder, {name: tensor.bfloat16() for name, tensor in tensors.items() if "norm" not in name})
    assert weights.resolve_dtype(folder, "auto") == "bfloat16"
    change(folder, {"lm_head.weight": tensors["lm_head.weight"]})
    assert weights.resolve_dtype(folder, "auto") == "float32"


@pytest.mark.parametrize("tied", [False, True])
def test_eight_bits_are_of_linear_layers_alone(tmp_path: Path, tied: bool) -> None:
    folder = write_model(tmp_path / "model", random_model(small(tied_embeddings=tied)))
    exact, rounded = weights.load_model(folder), weights.load_model(folder, "int8")
    assert torch.equal(rounded.embedding, exact.embedding)
    assert rounded.head is not None
    pairs = list(zip(exact.linear_weights(), rounded.linear_weights(), strict=True))
    assert len(pairs) == 2 * 4 + 1
    for before, after in pairs:
        assert torch.equal(after, dequantize_rows(*quantize_rows(before)))
        assert not torch.equal(after, before)


def test_another_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^dtype: "):
        weights.load_model(folder, "float16")


def test_stored_frequencies_of_older_checkpoints_are_passed_over(folder: Path) -> None:
    change(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    weights.load_model(folder)


def test_a_stored_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", random_model(), tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        weights.load_model(folder)
    change(folder, {"lm_head.weight": load_file(folder / weights.SINGLE_FILE)["model.embed_tokens.weight"].clone()})
    weights.load_model(folder)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.norm.weight", None),
        ("model.norm.weight", torch.ones(47)),
        ("model.norm.weight", torch.ones(48, dtype=torch.float64)),
        ("model.norm.weight", torch.ones(48, dtype=torch.int8)),
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(64)),
        ("model.layers.2.mlp.up_proj.weight", torch.ones(100, 48)),
    ],
)
def test_other_tensors_are_refused_by_name(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    change(folder, {name: tensor})
    with pytest.raises(ValueError, match=name):
        weights.load_model(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    split(folder, 2)
    (first, second) = sorted(folder.glob("*.safetensors"))
    save_file({**load_file(first), **load_file(second)}, second)
    with pytest.raises(ValueError, match="twice"):
        weights.load_model(folder)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "sub/file.safetensors", "weights.bin", 5])
def test_an_index_that_leads_elsewhere_is_refused(folder: Path, place: object) -> None:
    index = {"weight_map": {"model.norm.weight": place}}
    (folder / weights.INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="weight_map"):
        weights.load_model(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = (folder / weights.SINGLE_FILE).rename(tmp_path / "outside.safetensors")
    (folder / weights.SINGLE_FILE).symlink_to(outside)
    with pytest.raises(ValueError, match="leads out"):
        weights.load_model(folder)


def test_a_snapshot_of_the_hub_is_links_to_blobs(tmp_path: Path) -> None:
    cache = tmp_path / "models--someone--some-model"
    written = write_model(tmp_path / "written", random_model())
    snapshot = cache / "snapshots" / "0123abcd"
    for directory in (snapshot, cache / "blobs"):
        directory.mkdir(parents=True)
    for index, path in enumerate(sorted(written.iterdir())):
        blob = path.rename(cache / "blobs" / str(index))
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    assert model_folder.model_name(snapshot) == "someone/some-model"
    weights.load_model(snapshot)


def test_files_that_are_no_checkpoint_are_refused(folder: Path) -> None:
    (folder / weights.SINGLE_FILE).write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="not a safetensors file"):
        weights.load_model(folder)
    (folder / weights.SINGLE_FILE).unlink()
    with pytest.raises(ValueError, match="no such file"):
        weights.load_model(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="an object was expected"):
        weights.load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        weights.load_model(folder)


def test_hash_tells_weights_and_configuration_apart(folder: Path) -> None:
    before = weights.hash_weights(folder)
    assert before == weights.hash_weights(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0"}))
    assert weights.hash_weights(folder) == before
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    assert weights.hash_weights(folder) != before
    (folder / "config.json").write_text(json.dumps(config))
    change(folder, {"model.norm.weight": torch.ones(48)})
    assert weights.hash_weights(folder) != before


def test_hash_of_the_tokenizer(folder: Path) -> None:
    assert model_folder.hash_tokenizer(folder) == ""
    (folder / "tokenizer.json").write_text("{}")
    assert len(model_folder.hash_tokenizer(folder)) == 64


def test_models_are_found_by_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_folder.find_model(str(folder)) == folder
    assert model_folder.model_name(model_folder.find_model(str(folder))) == "model"
    monkeypatch.chdir(folder)
    assert model_folder.model_name(model_folder.find_model(".")) == "model"
    for missing in ("nowhere", str(folder / "nowhere"), "../nowhere", "./a/b"):
        with pytest.raises(ValueError, match="no folder"):
            model_folder.find_model(missing)


def test_other_models_come_from_the_hub_as_data_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "someone/missing":
            raise LocalEntryNotFoundError("not in the cache, and there is no network")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert model_folder.find_model("someone/some-model") == folder
    assert asked == [("someone/some-model", ["*.safetensors", "*.json", "*.jinja"])]
    with pytest.raises(ValueError, match="someone/missing"):
        model_folder.find_model("someone/missing")


def test_stored_bytes_are_those_of_all_files(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", random_model())
    assert weights.stored_bytes(folder) == (folder / "model.safetensors").stat().st_size
