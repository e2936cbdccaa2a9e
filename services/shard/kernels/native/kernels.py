"""A model in the native kernels: packed once, then one call per step.

Weights are packed into panels (`source/multiply.h`), one matrix after the other, so that no more than one is there
twice. The pages of the KV cache lie as the products read them.
Knows the model's parameters and the library's structures; nothing of sequences, nor of how the library is built.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.shard.kernels.interface import Logits
from services.shard.kernels.native import binding
from services.shard.kernels.quantize import quantize_rows
from services.shard.kv_cache import KeyValueCache
from services.shard.large_memory import Arena
from services.shard.models.architecture import Activation
from services.shard.models.transformer import Transformer, TransformerLayer
from services.shard.scheduler import Batch, Chunk

PANEL = 32
"""Columns of a panel, `kPanel`."""

SPLIT = 256
"""Positions of a split of attention, `kSplit`: a page divides it."""

_INNER_STEP = 64  # kInnerStep
_LANES = 16  # kLanes
_KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}
PAGES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
"""What keys and values are kept in."""


def padded(size: int, multiple: int = PANEL) -> int:
    """The next multiple that is not smaller."""
    return -(-size // multiple) * multiple


class NativeKernels:
    """`Kernels` in C++: a step is one call.

    Attributes:
        name: see `Kernels`.
        cache: see `Kernels`.
        embedding: [V, H], as it was stored.
    """

    def __init__(
        self,
        library: binding.Library,
        model: Transformer,
        dtype: str,
        *,
        block_count: int,
        block_size: int,
        threads: int,
    ) -> None:
        """Packs a model, whose matrices are gone afterwards.

        Args:
            library: to compute with.
            model: from `weights.load_model` with the same dtype.
            dtype: "float32", "bfloat16" or "int8".
            block_count: blocks of the KV cache.
            block_size: positions per block; a multiple of 32 that divides 256.
            threads: compute threads.
        """
        shape = model.architecture
        self.name = library.name
        self._library, self._kind, self._page = library, _KINDS[dtype], block_size
        self._vocabulary_size = shape.vocabulary_size
        self._kept: list[object] = []
        self._panels = Arena()
        self._unwanted_rows: dict[int, Tensor] = {}
        self.cache = KeyValueCache(
            shape.layer_count, block_count, block_size, shape.kv_head_count, padded(shape.head_size),
            dtype=PAGES[dtype],
        )  # fmt: skip
        self.embedding = model.embedding.data.contiguous()
        self._model = self._pack(model)
        self._stepper = ctypes.c_void_p(library.create(self._model, threads))

    def __del__(self) -> None:
        if hasattr(self, "_stepper"):
            self._library.destroy(self._stepper)

    def forward(self, batch: Batch, wants_logits: Sequence[bool]) -> Logits:
        """See `Kernels.forward`."""
        chunks = batch.chunks
        # The arrays of Python's library are made faster than those of NumPy, and say where they are.
        shapes = array(
            "i", [n for each in chunks for n in (each.start, len(each.token_ids), len(each.block_table), each.draws)]
        )
        token_ids = array("i", chain.from_iterable(chunk.token_ids for chunk in chunks))
        tables = array("i", chain.from_iterable(chunk.block_table for chunk in chunks))
        drawn = len(wants_logits)
        best, finite = array("i", bytes(4 * drawn)), array("B", bytes(len(token_ids)))
        logits = torch.empty(drawn, self._vocabulary_size) if any(wants_logits) else self._unwanted(drawn)
        step = binding.Step(
            chunks=shapes.buffer_info()[0],
            token_ids=token_ids.buffer_info()[0],
            tables=tables.buffer_info()[0],
            wants_logits=bytes(wants_logits),
            logits=logits.data_ptr(),
            best=best.buffer_info()[0],
            finite=finite.buffer_info()[0],
            chunk_count=len(chunks),
        )
        if self._library.forward(self._stepper, step):
            places = chain.from_iterable(_places(chunk, self._page) for chunk in chunks)
            self._invalidate([place for place, good in zip(places, finite, strict=True) if not good])
        return Logits(logits, best.tolist())

    def _unwanted(self, rows: int) -> Tensor:
        """Logits that nobody reads, and nothing writes: made once per number of rows, which spares a cold call."""
        if rows not in self._unwanted_rows:
            self._unwanted_rows[rows] = torch.full((1, 1), torch.nan).expand(rows, self._vocabulary_size)
        return self._unwanted_rows[rows]

    def _invalidate(self, places: Sequence[tuple[int, int]]) -> None:
        """See `KeyValueCache.invalidate`; a page here keeps groups of elements together."""
        group = 1 if self._kind == 0 else 2
        blocks, slots = torch.tensor(places).unbind(1)
        for keys, values in zip(self.cache.keys, self.cache.values, strict=True):
            heads, head = keys.shape[1:3]
            keys.view(-1, heads, head // group, self._page, group)[blocks, :, :, slots] = torch.nan
            values.view(-1, heads, self._page // group, head, group)[blocks, :, slots // group, :, slots % group] = 0.0

    def _pack(self, model: Transformer) -> binding.Model:
        shape = model.architecture
        layers = (binding.Layer * shape.layer_count)()
        for index, (layer, kind) in enumerate(zip(model.layers, shape.layers, strict=True)):
            assert isinstance(layer, TransformerLayer)
            layers[index] = self._layer(layer)
            layers[index].rotation = self._keep(model.rotations[shape.rotaries.index(kind.rotary)])
            layers[index].keys = self.cache.keys[index].data_ptr()
            layers[index].values = self.cache.values[index].data_ptr()
            layers[index].window = kind.window or 0
        head = self.embedding if model.head is None else model.head.data
        self._kept.append(layers)
        return binding.Model(
            embedding=self._keep(self.embedding),
            norm=self._vector(model.norm),
            layers=layers,
            head=self._linear(head, None),
            weight_kind=self._kind,
            embedding_kind=int(self.embedding.dtype == torch.bfloat16),
            layer_count=shape.layer_count,
            vocabulary=shape.vocabulary_size,
            hidden=shape.hidden_size,
            intermediate=shape.intermediate_size,
            heads=shape.head_count,
            kv_heads=shape.kv_head_count,
            head_size=shape.head_size,
            page=self._page,
            activation=int(shape.activation is Activation.GELU_TANH),
            epsilon=shape.norm_epsilon,
            attention_scale=shape.attention_scale,
            attention_softcap=shape.attention_softcap or 0.0,
            logit_softcap=shape.logit_softcap or 0.0,
            embedding_scale=shape.embedding_scale,
        )

    def _layer(self, layer: TransformerLayer) -> binding.Layer:
        half = layer.gate_up.shape[0] // 2
        # A panel holds 16 columns of the gate and the same 16 of up: whoever has the one has the other.
        columns = np.arange(padded(half, _LANES)).reshape(-1, 1, _LANES)
        columns = np.where(columns < half, columns, -1)
        joined = np.concatenate([columns, np.where(columns >= 0, columns + half, -1)], axis=1).reshape(-1)
        return binding.Layer(
            attention_norm=self._vector(layer.attention_norm),
            query_norm=self._vector(layer.query_norm),
            key_norm=self._vector(layer.key_norm),
            post_attention_norm=self._vector(layer.post_attention_norm),
            feed_forward_norm=self._vector(layer.feed_forward_norm),
            post_feed_forward_norm=self._vector(layer.post_feed_forward_norm),
            query_key_value=self._take(layer, "query_key_value"),
            output=self._take(layer, "attention_output"),
            gate_up=self._take(layer, "gate_up", joined),
            down=self._take(layer, "down"),
        )

    def _take(self, layer: TransformerLayer, name: str, order: NDArray[np.int64] | None = None) -> binding.Linear:
        """Packs a matrix of a layer and gives its memory back."""
        weight: Tensor = getattr(layer, name)
        packed = self._linear(weight.data, getattr(layer, f"{name}_bias"), order)
        weight.data = weight.data.new_empty(0)
        return packed

    def _linear(self, weight: Tensor, bias: Tensor | None, order: NDArray[np.int64] | None = None) -> binding.Linear:
        """Packs [N, K]; `order` says which row is at each column, -1 for none."""
        count, inner = weight.shape
        order = np.arange(count) if order is None else order
        columns = np.full(padded(len(order)), -1, np.int32)
        columns[: len(order)] = order
        scales = sums = None
        if self._kind == _KINDS["int8"]:
            weight, row_scales = quantize_rows(weight)
            scales, sums = self._ordered(row_scales, columns), self._ordered(weight.sum(1, dtype=torch.int32), columns)
        weight = weight.contiguous()
        depth = padded(inner, _INNER_STEP)
        panels = self._panels.take(len(columns) * depth * weight.element_size())
        self._library.pack(
            self._kind, weight.data_ptr(), columns.ctypes.data, len(columns) // PANEL, inner, depth, panels
        )
        return binding.Linear(
            panels=panels,
            scales=scales,
            column_sums=sums,
            bias=None if bias is None else self._ordered(bias.data, columns),
            inner=depth,
            panel_count=len(columns) // PANEL,
        )

    def _ordered(self, values: Tensor, columns: NDArray[np.int32]) -> int:
        """Address of one value per column, zero where there is none."""
        ordered = values[torch.from_numpy(columns).clamp(min=0).long()]
        ordered[torch.from_numpy(columns < 0)] = 0
        return self._keep(ordered)

    def _vector(self, values: Tensor | None) -> int | None:
        """Address of a norm's weights, with zeros up to a whole vector; None where there is none."""
        if values is None:
            return None
        return self._keep(torch.nn.functional.pad(values.data.float(), (0, padded(len(values)) - len(values))))

    def _keep(self, tensor: Tensor) -> int:
        """Address of a tensor that lives as long as this."""
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _places(chunk: Chunk, page: int) -> Iterator[tuple[int, int]]:
    """Block and slot of each token of a chunk."""
    for position in range(chunk.start, chunk.start + len(chunk.token_ids)):
        yield chunk.block_table[position // page], position % page
