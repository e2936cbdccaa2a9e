"""A Llama and its reference against transformers, names of checkpoints, and the model as something that learns.

How every family is served is tested in `test_parity.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from services.shard.kernels.dense import DenseOperations
from services.shard.kernels.tiled import pack
from services.shard.models.families import llama
from services.shard.models.registry import read_architecture
from services.shard.models.transformer import Transformer
from services.shard.weights import load_model
from tests.families import family_config, family_models, open_family, write_family
from tests.random_model import SMALL, random_model, small, write_model
from tests.reference import Reference

SHAPES = {
    "grouped": SMALL,
    "multi-head": small(kv_head_count=4),
    "multi-query": small(kv_head_count=1, rope_theta=500000.0, norm_epsilon=1e-5),
    "narrow heads, tied": small(head_size=6, tied_embeddings=True),
}


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def model(request: pytest.FixtureRequest) -> Transformer:
    return random_model(request.param)


def dense_logits(model: Transformer, token_ids: torch.Tensor) -> torch.Tensor:
    operations = DenseOperations()
    return model.logits(model(token_ids, torch.arange(token_ids.shape[-1]), operations), operations)


def random_ids(model: Transformer, *shape: int) -> torch.Tensor:
    size = model.architecture.vocabulary_size
    return torch.randint(0, size, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_and_greedy_tokens_are_those_of_transformers(model: Transformer, tmp_path: Path) -> None:
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
def test_a_batch_is_its_sequences(model: Transformer) -> None:
    token_ids = random_ids(model, 3, 30)
    together = dense_logits(model, token_ids)
    apart = torch.stack([dense_logits(model, row) for row in token_ids])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_packing_changes_no_result(model: Transformer) -> None:
    token_ids = random_ids(model, 30)
    expected = dense_logits(model, token_ids)
    torch.testing.assert_close(dense_logits(model.map_linear_weights(pack), token_ids), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-biased", "qwen3", "gemma2", "gemma3"])
def test_dense_operations_compute_every_family(name: str, tmp_path: Path) -> None:
    """Windows, soft caps and the other gate, for whole sequences and batches of them."""
    folder = write_family(tmp_path / "model", name)
    token_ids = torch.randint(0, 320, (2, 90), generator=torch.Generator().manual_seed(0))
    expected = open_family(folder, torch.float32)(token_ids).logits
    torch.testing.assert_close(dense_logits(load_model(folder), token_ids), expected, atol=2e-4, rtol=1e-4)


def test_checkpoint_has_the_names_and_shapes_of_transformers(model: Transformer) -> None:
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**llama.write(model.architecture)))
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.named_parameters()}
    assert {name: tuple(tensor.shape) for name, tensor in model.to_checkpoint().items()} == expected


@pytest.mark.parametrize("name", [name for name, _ in family_models()])
def test_a_checkpoint_is_written_as_it_was_read(name: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", name)
    stored = dict(open_family(folder, torch.float32).named_parameters())
    written = load_model(folder).to_checkpoint()
    assert written.keys() == stored.keys()
    for tensor_name, tensor in stored.items():
        torch.testing.assert_close(written[tensor_name], tensor.data, rtol=0, atol=1e-6 * ("norm" in tensor_name))


def test_norms_and_biases_are_float32(tmp_path: Path) -> None:
    model = load_model(write_family(tmp_path / "model", "llama-biased", dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters() if parameter.dim() == 1} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if parameter.dim() == 2} == {torch.bfloat16}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("name", "steps"), [("small", 25), ("llama-biased", 40), ("gemma3", 70)])
def test_it_learns(name: str, steps: int, autocast: bool) -> None:
    """Every parameter has a gradient, and a few steps learn a text by heart, in bfloat16 too."""
    shape = SMALL if name == "small" else read_architecture(family_config(name).to_dict())
    model = Transformer(shape).initialise(torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    token_ids = random_ids(model, 2, 21)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = dense_logits(model, token_ids[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), token_ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert 5.0 < losses[0] < 6.2  # ln 211 = 5.35 and ln 320 = 5.77: fresh weights know nothing
    assert losses[-1] < 0.5
