"""The model and its reference against transformers, and the model as something that learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig as TransformersConfig
from transformers import LlamaForCausalLM

from services.shard.kernels.dense import DenseOperations
from services.shard.kernels.tiled import pack
from services.shard.models.config import LlamaConfig
from services.shard.models.llama import Llama
from tests.random_model import SMALL, random_model, write_model
from tests.reference import Reference

SHAPES = {
    "grouped": SMALL,
    "multi-head": dataclasses.replace(SMALL, kv_head_count=4),
    "multi-query": dataclasses.replace(SMALL, kv_head_count=1, rope_theta=500000.0, norm_epsilon=1e-5),
    "narrow heads, tied": dataclasses.replace(SMALL, head_size=6, tied_embeddings=True),
}


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def model(request: pytest.FixtureRequest) -> Llama:
    return random_model(request.param)


def dense_logits(model: Llama, token_ids: torch.Tensor) -> torch.Tensor:
    operations = DenseOperations()
    return model.logits(model(token_ids, torch.arange(token_ids.shape[-1]), operations), operations)


def random_ids(model: Llama, *shape: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocabulary_size, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_and_greedy_tokens_are_those_of_transformers(model: Llama, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", model)
    theirs: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    token_ids = random_ids(model, 100)
    expected = theirs(token_ids[None]).logits[0]
    reference = Reference(folder)
    assert expected.std() > 0.5
    torch.testing.assert_close(dense_logits(model, token_ids), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reference.logits(token_ids.tolist()), expected, atol=1e-4, rtol=1e-4)
    prompt = token_ids[:20]
    generated = theirs.generate(prompt[None], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generated[0, 20:].tolist() == reference.greedy(prompt.tolist(), 12)


@torch.no_grad()
def test_a_batch_is_its_sequences(model: Llama) -> None:
    token_ids = random_ids(model, 3, 30)
    together = dense_logits(model, token_ids)
    apart = torch.stack([dense_logits(model, row) for row in token_ids])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_packing_changes_no_result(model: Llama) -> None:
    token_ids = random_ids(model, 30)
    expected = dense_logits(model, token_ids)
    torch.testing.assert_close(dense_logits(model.pack(pack), token_ids), expected, atol=1e-5, rtol=1e-5)


def test_checkpoint_has_the_names_and_shapes_of_transformers(model: Llama) -> None:
    with torch.device("meta"):
        theirs = LlamaForCausalLM(TransformersConfig(**model.config.to_dict()))
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.named_parameters()}
    assert {name: tuple(tensor.shape) for name, tensor in model.to_checkpoint().items()} == expected


@pytest.mark.parametrize("autocast", [False, True])
def test_it_learns(autocast: bool) -> None:
    """Every parameter has a gradient, and a few steps learn a text by heart, in bfloat16 too."""
    model = Llama(SMALL).initialise(torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    token_ids = random_ids(model, 2, 21)
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = dense_logits(model, token_ids[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), token_ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert 5.0 < losses[0] < 5.8  # ln 211 = 5.35: fresh weights know nothing
    assert losses[-1] < 0.5


def test_config_reads_what_it_writes_and_what_transformers_writes() -> None:
    for config in SHAPES.values():
        assert LlamaConfig.from_dict(config.to_dict()) == config
        assert LlamaConfig.from_dict(TransformersConfig(**config.to_dict()).to_dict()) == config


def test_config_of_older_checkpoints() -> None:
    """Fields that came later have the values that they had before they existed."""
    older = {
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
    config = LlamaConfig.from_dict(older)
    assert (config.kv_head_count, config.head_size, config.rope_theta) == (4, 6, 1234.0)
    assert not config.tied_embeddings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["MistralForCausalLM"]),
        ("model_type", "qwen2"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("pretraining_tp", 2),
        ("quantization_config", {"bits": 4}),
        ("sliding_window", 128),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        ("rope_parameters", "default"),
        ("num_key_value_heads", 3),
        ("num_hidden_layers", 0),
        ("hidden_size", "48"),
        ("vocab_size", True),
        ("head_dim", 7),
        ("rms_norm_eps", -1.0),
        ("max_position_embeddings", None),
        ("tie_word_embeddings", "yes"),
    ],
)
def test_what_is_not_served_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        LlamaConfig.from_dict({**SMALL.to_dict(), field: value})
