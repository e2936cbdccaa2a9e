"""The native kernels, held to the model computed densely: every instruction set of this machine, every kind of weights,
every edge of a shape; and a row's bits, which no neighbour, chunk or thread may change (R23)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.shard.kernels.dense import DenseOperations
from services.shard.kernels.native import compiler
from services.shard.kernels.native.binding import Library
from services.shard.kernels.native.kernels import NativeKernels
from services.shard.kernels.quantize import dequantize_rows, quantize_rows
from services.shard.models.architecture import Activation, Architecture, LayerKind, Rotary
from services.shard.models.transformer import Transformer
from services.shard.scheduler import Batch, Chunk

DTYPES = {"float32": 2e-4, "bfloat16": 0.25, "int8": 0.15}
"""Kinds of weights, with the error that their rounding may make in logits of a standard deviation near 1.5."""

BASE = Architecture(
    family="llama",
    vocabulary_size=331,
    hidden_size=96,
    intermediate_size=200,
    head_count=6,
    kv_head_count=2,
    head_size=24,
    context_length=700,
    layers=(LayerKind(),) * 2,
    attention_scale=0.2,
    attention_bias=True,
    output_bias=True,
    feed_forward_bias=True,
    query_key_norm=True,
)
"""Norms of heads keep attention from being so peaked that a rounding error of bfloat16 changes it wholly."""


def changed(**changes: object) -> Architecture:
    """The base with other fields."""
    values = {name: getattr(BASE, name) for name in BASE.__dataclass_fields__}
    return Architecture(**{**values, **changes})


EDGES = {
    "base": BASE,
    "nothing divides": changed(
        vocabulary_size=97, hidden_size=42, intermediate_size=37, head_size=10, head_count=3, kv_head_count=1,
    ),
    "whole vectors": changed(
        vocabulary_size=128, hidden_size=64, intermediate_size=64, head_size=64, head_count=4, kv_head_count=2,
    ),
    "no groups": changed(head_count=3, kv_head_count=3, head_size=80),
    "wide group": changed(head_count=40, kv_head_count=1, head_size=16),
    "no biases": changed(attention_bias=False, output_bias=False, feed_forward_bias=False, tied_embeddings=True),
    "post norms, caps, windows": changed(
        post_norms=True, attention_softcap=5.0, logit_softcap=10.0,
        activation=Activation.GELU_TANH, embedding_scale=9.8,
        layers=(LayerKind(window=70), LayerKind(Rotary(1e6)), LayerKind(window=256)),
    ),
}  # fmt: skip


@functools.cache
def library(name: str) -> Library:
    """The kernels for one instruction set."""
    (target,) = (target for target in compiler.targets() if target.name == name)
    return Library(compiler.build(target))


def fill(model: Transformer) -> Transformer:
    """Random weights; attention neither flat nor peaked, no norm all one."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 * parameter.shape[1] ** -0.5)
    return model.requires_grad_(False)


class Subject:
    """A model in native kernels, with a pool of pages."""

    def __init__(self, shape: Architecture, dtype: str, name: str, *, threads: int = 1, page: int = 64) -> None:
        stored = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        self.page = page
        self.kernels = NativeKernels(
            library(name), fill(Transformer(shape, stored)), dtype,
            block_count=3 * -(-700 // page), block_size=page, threads=threads,
        )  # fmt: skip

    def chunk(self, start: int, token_ids: Sequence[int], first_block: int = 0) -> Chunk:
        """Tokens of a sequence whose pages follow each other from `first_block` on."""
        pages = -(-(start + len(token_ids)) // self.page)
        return Chunk(start, list(token_ids), list(range(first_block, first_block + pages)), draws=True)

    def logits(self, *chunks: Chunk) -> NDArray[np.float32]:
        """Logits of all chunks, in one step."""
        logits, best, *_ = self.kernels.forward(Batch(list(chunks), []), [True] * len(chunks))
        assert best == logits.argmax(1).tolist()
        values: NDArray[np.float32] = logits.numpy()
        return values

    def alone(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits behind each token of a sequence, computed one by one."""
        return np.concatenate([self.logits(self.chunk(place, [each])) for place, each in enumerate(token_ids)])


def reference(shape: Architecture, dtype: str, token_ids: Sequence[int]) -> Tensor:
    """Logits of the dense model with the weights that the kernels have, in float32."""
    model = fill(Transformer(shape, torch.bfloat16 if dtype == "bfloat16" else torch.float32)).float()
    if dtype == "int8":
        model.map_linear_weights(lambda weight: dequantize_rows(*quantize_rows(weight)))
    with torch.inference_mode():
        operations = DenseOperations()
        hidden = model(torch.tensor(token_ids), torch.arange(len(token_ids)), operations)
        logits: Tensor = model.logits(hidden, operations)
    return logits


def ids(count: int, shape: Architecture, seed: int = 0) -> list[int]:
    """Random token ids."""
    token_ids: list[int] = np.random.default_rng(seed).integers(0, shape.vocabulary_size, count).tolist()
    return token_ids


@pytest.mark.parametrize("name", [target.name for target in compiler.targets()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_dense_logits(name: str, dtype: str) -> None:
    token_ids = ids(150, BASE)
    subject = Subject(BASE, dtype, name, threads=2)
    expected = reference(BASE, dtype, token_ids).numpy()
    actual = subject.alone(token_ids)
    assert expected.std() > 1
    assert np.abs(actual - expected).max() < DTYPES[dtype]
    chunk = subject.logits(subject.chunk(0, token_ids, first_block=11))[0]
    assert (chunk == actual[-1]).all()


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_edge_of_a_shape(edge: str, dtype: str) -> None:
    shape = EDGES[edge]
    token_ids = ids(90, shape)
    subject = Subject(shape, dtype, compiler.targets()[0].name)
    expected = reference(shape, dtype, token_ids).numpy()
    assert np.abs(subject.alone(token_ids) - expected).max() < DTYPES[dtype] * max(1.0, float(expected.std()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page", [32, 64, 256])
def test_chunks_neighbours_pages_and_threads_change_no_bit(dtype: str, page: int) -> None:
    """Windows and splits included: the sequence is longer than both."""
    shape = EDGES["post norms, caps, windows"]
    token_ids, other = ids(600, shape), ids(40, shape, seed=1)
    subject = Subject(shape, dtype, compiler.targets()[0].name, threads=2, page=page)
    alone = subject.alone(token_ids)
    blocks = -(-700 // page)
    again = Subject(shape, dtype, compiler.targets()[0].name, threads=1, page=page)
    for place, end in _cuts(600):
        chunks = [
            again.chunk(0, other[: 1 + place % 40], first_block=2 * blocks),
            again.chunk(place, token_ids[place:end], first_block=blocks),
        ]
        assert (again.logits(*chunks)[1] == alone[end - 1]).all(), (place, end)


def _cuts(count: int) -> Iterator[tuple[int, int]]:
    """Cuts a sequence into chunks of odd sizes."""
    sizes, place = [1, 5, 17, 64, 130, 256, 3], 0
    while place < count:
        end = min(count, place + sizes[place % len(sizes)])
        yield place, end
        place = end


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_later_token_changes_no_earlier_logit(dtype: str) -> None:
    """Causality, bit for bit."""
    token_ids = ids(130, BASE)
    subject = Subject(BASE, dtype, compiler.targets()[0].name)
    before = [subject.logits(subject.chunk(0, token_ids[: place + 1]))[0] for place in (0, 63, 64, 100)]
    subject.logits(subject.chunk(0, token_ids[:101] + [1] * 29))
    for place, logits in zip((0, 63, 64, 100), before, strict=True):
        again = subject.logits(subject.chunk(place, [token_ids[place]]))[0]
        assert (again == logits).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_that_is_not_finite_fails_alone_and_leaves_no_trace(dtype: str) -> None:
    subject = Subject(BASE, dtype, compiler.targets()[0].name)
    token_ids = ids(30, BASE)
    broken = next(token_id for token_id in range(9, BASE.vocabulary_size) if token_id not in token_ids)
    alone = subject.alone(token_ids)[-1]
    kernels = subject.kernels
    embedding = kernels.embedding
    embedding[broken] = torch.inf
    chunks = [subject.chunk(0, [broken] * 30, first_block=20), subject.chunk(0, token_ids)]
    logits, best, *_ = kernels.forward(Batch(chunks, []), [True, True])
    assert best == [-1, alone.argmax()]
    assert (logits[1].numpy() == alone).all()
    # The next owner of the block sees nothing of it, not even in slots that it has not filled.
    later = subject.logits(subject.chunk(0, token_ids[:3], first_block=20))[0]
    assert (later == subject.logits(subject.chunk(0, token_ids[:3], first_block=25))[0]).all()
    # The sequence itself stays broken.
    logits, best, *_ = kernels.forward(Batch([subject.chunk(0, [broken] * 30, 20)], []), [True])
    logits, best, *_ = kernels.forward(Batch([subject.chunk(30, [1], 20)], []), [True])
    assert best == [-1]


def test_logits_that_nobody_reads_are_not_written() -> None:
    subject = Subject(BASE, "float32", compiler.targets()[0].name)
    chunks = [subject.chunk(0, [3, 4, 5]), subject.chunk(0, [6, 7], first_block=5)]
    both = subject.logits(*chunks)
    logits, best, *_ = subject.kernels.forward(Batch(chunks, []), [False, True])
    assert best == both.argmax(1).tolist() and (logits[1].numpy() == both[1]).all()


def test_equal_logits_go_to_the_lowest_id() -> None:
    model = fill(Transformer(changed(tied_embeddings=False)))
    assert model.head is not None
    model.head.data[:] = model.head.data[7]
    kernels = NativeKernels(
        library(compiler.targets()[0].name), model, "float32", block_count=2, block_size=64, threads=2
    )
    logits, best, *_ = kernels.forward(Batch([Chunk(0, [1, 2], [0], draws=True)], []), [True])
    assert (logits == logits[0, 0]).all() and best == [0]
