"""A decoder-only transformer: which operations follow each other, and nothing of how they are computed.

The same code serves and trains; the `operations` that it is given make the difference. Serving passes fixed tiles over
the pages of a KV cache (`kernels/tiled.py`), training passes dense, differentiable operations:

    shape = llama.architecture(vocabulary_size=2048, hidden_size=192, intermediate_size=512, layer_count=6,
                               head_count=6, kv_head_count=2, head_size=32, context_length=1024)
    model = Transformer(shape).initialise(torch.Generator().manual_seed(1))
    operations = DenseOperations()                                   # services.shard.kernels.dense
    positions = torch.arange(length)
    with torch.autocast("cpu", torch.bfloat16):                      # or without
        hidden = model(token_ids, positions, operations)             # token_ids [B, length] -> [B, length, H] float32
        logits = model.logits(hidden, operations)                    # [B, length, V]
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    ...
    save_file(model.to_checkpoint(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(llama.write(shape), indent=2))

Matrices and the embedding have the dtype of the model; norms and biases are float32, as is the residual stream. Norms
hold what they multiply by: `Architecture.norm_offset` is added when they are loaded.
Knows no file, no batch, no cache and no family.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.shard.kernels.interface import Operations
from services.shard.models.architecture import Architecture, LayerKind, LinearScaling, Llama3Scaling, Rotary

_INITIAL_DEVIATION = 0.02
"""Standard deviation of fresh weights, as in GPT-2 (Radford et al. 2019)."""


class TransformerLayer(nn.Module):
    """One layer. Query, key and value share one matrix, and so do gate and up: two products instead of five.

    Parameters that the architecture does not have are None.
    """

    def __init__(self, architecture: Architecture, kind: LayerKind, dtype: torch.dtype) -> None:
        super().__init__()
        self.architecture, self.kind = architecture, kind
        hidden_size, head_size = architecture.hidden_size, architecture.head_size
        width, kv_width = architecture.head_count * head_size, architecture.kv_head_count * head_size
        normed, post_norms = architecture.query_key_norm, architecture.post_norms
        feed_forward_bias = architecture.feed_forward_bias

        def matrix(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, columns, dtype=dtype))

        def vector(size: int, present: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(size)) if present else None

        self.attention_norm = vector(hidden_size)
        self.query_key_value = matrix(width + 2 * kv_width, hidden_size)
        self.query_key_value_bias = vector(width + 2 * kv_width, architecture.attention_bias)
        self.query_norm = vector(head_size, normed)
        self.key_norm = vector(head_size, normed)
        self.attention_output = matrix(hidden_size, width)
        self.attention_output_bias = vector(hidden_size, architecture.output_bias)
        self.post_attention_norm = vector(hidden_size, post_norms)
        self.feed_forward_norm = vector(hidden_size)
        self.gate_up = matrix(2 * architecture.intermediate_size, hidden_size)
        self.gate_up_bias = vector(2 * architecture.intermediate_size, feed_forward_bias)
        self.down = matrix(hidden_size, architecture.intermediate_size)
        self.down_bias = vector(hidden_size, feed_forward_bias)
        self.post_feed_forward_norm = vector(hidden_size, post_norms)

    def forward(self, hidden: Tensor, layer: int, cosine: Tensor, sine: Tensor, operations: Operations) -> Tensor:
        """Adds attention, then the feed-forward block, to the residual stream [..., H]."""
        added = self._attention(self._normed(hidden, self.attention_norm, operations), layer, cosine, sine, operations)
        hidden = hidden + self._normed(added, self.post_attention_norm, operations)
        gate_up = operations.linear(
            self._normed(hidden, self.feed_forward_norm, operations), self.gate_up, self.gate_up_bias
        )
        added = operations.linear(operations.gate(gate_up, self.architecture.activation), self.down, self.down_bias)
        return hidden + self._normed(added, self.post_feed_forward_norm, operations)

    def _attention(self, rows: Tensor, layer: int, cosine: Tensor, sine: Tensor, operations: Operations) -> Tensor:
        shape = self.architecture
        heads = operations.linear(rows, self.query_key_value, self.query_key_value_bias)
        heads = heads.view(*rows.shape[:-1], -1, shape.head_size)
        query_key, value = heads[..., : -shape.kv_head_count, :], heads[..., -shape.kv_head_count :, :]
        if shape.query_key_norm:
            query, key = query_key[..., : shape.head_count, :], query_key[..., shape.head_count :, :]
            normed = self._normed(query, self.query_norm, operations), self._normed(key, self.key_norm, operations)
            query_key = torch.cat(normed, -2)
        turned = operations.rotary(query_key, cosine, sine)
        query, key = turned[..., : shape.head_count, :], turned[..., shape.head_count :, :]
        mixed = operations.attention(
            layer, query, key, value,
            scale=shape.attention_scale, window=self.kind.window, softcap=shape.attention_softcap,
        )  # fmt: skip
        return operations.linear(mixed, self.attention_output, self.attention_output_bias)

    def _normed(self, rows: Tensor, weight: Tensor | None, operations: Operations) -> Tensor:
        """Normalised, or as they are where the architecture has no such norm."""
        return rows if weight is None else operations.rms_norm(rows, weight, self.architecture.norm_epsilon)


class Transformer(nn.Module):
    """A model. Its parameters are empty until `initialise` or `checkpoint_views` fills them."""

    head: nn.Parameter | None
    rotations: Tensor

    def __init__(self, architecture: Architecture, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.architecture = architecture
        shape = architecture.vocabulary_size, architecture.hidden_size
        self.embedding = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.layers = nn.ModuleList(TransformerLayer(architecture, kind, dtype) for kind in architecture.layers)
        self.norm = nn.Parameter(torch.empty(architecture.hidden_size))
        head = None if architecture.tied_embeddings else nn.Parameter(torch.empty(shape, dtype=dtype))
        self.register_parameter("head", head)
        rotaries = architecture.rotaries
        tables = [rotary_table(rotary, architecture) for rotary in rotaries]
        self.register_buffer("rotations", torch.stack(tables), persistent=False)
        self._rotary_of_layers = [rotaries.index(kind.rotary) for kind in architecture.layers]

    def forward(self, token_ids: Tensor, positions: Tensor, operations: Operations) -> Tensor:
        """Runs all layers.

        Args:
            token_ids: int64 [...].
            positions: int64, position of each token in its own sequence; broadcasts to `token_ids`.
            operations: how to compute.

        Returns:
            The residual stream after the last layer, float32 [..., H].
        """
        hidden = functional.embedding(token_ids, self.embedding).float()
        if self.architecture.embedding_scale != 1.0:
            hidden = hidden * self.architecture.embedding_scale
        turns = []
        for table in self.rotations.unbind():
            cosine, sine = functional.embedding(positions, table).chunk(2, -1)
            turns.append((torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)))
        for index, layer in enumerate(self.layers):
            cosine, sine = turns[self._rotary_of_layers[index]]
            hidden = layer(hidden, index, cosine, sine, operations)
        return hidden

    def logits(self, hidden: Tensor, operations: Operations) -> Tensor:
        """The final norm, the head and its soft cap: [..., H] gives [..., V]."""
        normed = operations.rms_norm(hidden, self.norm, self.architecture.norm_epsilon)
        logits = operations.linear(normed, self.embedding if self.head is None else self.head)
        cap = self.architecture.logit_softcap
        return logits if cap is None else operations.softcap(logits, cap)

    def initialise(self, generator: torch.Generator) -> Self:
        """Draws fresh weights; those that add to the residual stream are smaller by the root of their number."""
        outputs = ("attention_output", "down")
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                else:
                    deviation = _INITIAL_DEVIATION
                    if name.endswith(outputs):
                        deviation /= math.sqrt(2 * self.architecture.layer_count)
                    parameter.normal_(0.0, deviation, generator=generator)
        return self

    def map_linear_weights(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Replaces the matrices of linear layers by what `change` makes of them; the model then only serves.

        A head that is tied to the embedding becomes a matrix of its own, as rows are looked up in the other.
        """
        if self.head is None:
            self.head = nn.Parameter(self.embedding.data)
        self.requires_grad_(False)
        for weight in self.linear_weights():
            weight.data = change(weight.data)
        return self

    def linear_weights(self) -> list[nn.Parameter]:
        """The matrices that `Operations.linear` is given."""
        in_layers = [parameter for parameter in self.layers.parameters() if parameter.dim() == 2]
        return [*in_layers, self.embedding if self.head is None else self.head]

    def checkpoint_views(self) -> dict[str, Tensor]:
        """Views of the parameters under the names of Hugging Face's checkpoints; copying into them loads.

        Norms lack `norm_offset` in a checkpoint: see `norms`.
        """
        views = {"model.embed_tokens.weight": self.embedding.data, "model.norm.weight": self.norm.data}
        if self.head is not None:
            views["lm_head.weight"] = self.head.data
        for index, layer in enumerate(self.layers):
            for name, parameter in self._layer_views(layer).items():
                views[f"model.layers.{index}.{name}"] = parameter
        return views

    def norms(self) -> dict[str, Tensor]:
        """Those of `checkpoint_views` that are norms."""
        return {name: view for name, view in self.checkpoint_views().items() if name.endswith("norm.weight")}

    def to_checkpoint(self) -> dict[str, Tensor]:
        """Copies of the parameters by their names in a checkpoint, each with storage of its own."""
        copies = {name: view.clone() for name, view in self.checkpoint_views().items()}
        for name in self.norms():
            copies[name] -= self.architecture.norm_offset
        return copies

    def _layer_views(self, layer: nn.Module) -> dict[str, Tensor]:
        """Views of one layer's parameters under their names in a checkpoint, without the layer's own prefix."""
        shape = self.architecture
        width, kv_width = shape.head_count * shape.head_size, shape.kv_head_count * shape.head_size
        joined = {
            "query_key_value": {"self_attn.q_proj": width, "self_attn.k_proj": kv_width, "self_attn.v_proj": kv_width},
            "attention_output": {"self_attn.o_proj": shape.hidden_size},
            "gate_up": {"mlp.gate_proj": shape.intermediate_size, "mlp.up_proj": shape.intermediate_size},
            "down": {"mlp.down_proj": shape.hidden_size},
        }
        views = {}
        for name, parameter in layer.named_parameters():
            base = name.removesuffix("_bias")
            if base in joined:
                suffix = "weight" if base == name else "bias"
                parts = parameter.data.split_with_sizes(list(joined[base].values()))
                views.update({f"{part}.{suffix}": view for part, view in zip(joined[base], parts, strict=True)})
            else:
                views[f"{self._norm_names()[name]}.weight"] = parameter.data
        return views

    def _norm_names(self) -> dict[str, str]:
        """What checkpoints call a layer's norms: with norms behind the blocks, too, one of the names means another."""
        names = {
            "attention_norm": "input_layernorm",
            "query_norm": "self_attn.q_norm",
            "key_norm": "self_attn.k_norm",
        }
        if not self.architecture.post_norms:
            return {**names, "feed_forward_norm": "post_attention_layernorm"}
        return {
            **names,
            "post_attention_norm": "post_attention_layernorm",
            "feed_forward_norm": "pre_feedforward_layernorm",
            "post_feed_forward_norm": "post_feedforward_layernorm",
        }


def rotary_table(rotary: Rotary, architecture: Architecture) -> Tensor:
    """Cosines, then sines of every position's angles, float32 [context_length, D]."""
    angles = torch.outer(
        torch.arange(architecture.context_length, dtype=torch.float32), _frequencies(rotary, architecture.head_size)
    ).double()
    # In float64: the vector and the scalar form of float32 differ, and threads decide which one an element gets.
    return torch.cat([angles.cos().float(), angles.sin().float()], -1)


def _frequencies(rotary: Rotary, head_size: int) -> Tensor:
    """Radians per position of each pair, float32 [D / 2], rounded as everyone rounds them who serves these models."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    frequencies = 1.0 / (rotary.theta**exponents)
    match rotary.scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling(factor, low, high, original):
            waves = 2 * math.pi / frequencies
            share = ((original / waves - low) / (high - low)).clamp(0.0, 1.0)
            return (1 - share) * frequencies / factor + share * frequencies
