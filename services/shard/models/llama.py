"""The Llama architecture: which operations follow each other, and nothing of how they are computed.

The same code serves and trains; the `operations` that it is given make the difference. Serving passes fixed tiles over
the pages of a KV cache (`kernels/tiled.py`), training passes dense, differentiable operations:

    config = LlamaConfig(vocabulary_size=2048, hidden_size=192, intermediate_size=512, layer_count=6, head_count=6,
                         kv_head_count=2, head_size=32, context_length=1024, tied_embeddings=True)
    model = Llama(config).initialise(torch.Generator().manual_seed(1))
    operations = DenseOperations()                                   # services.shard.kernels.dense
    positions = torch.arange(length)
    with torch.autocast("cpu", torch.bfloat16):                      # or without
        hidden = model(token_ids, positions, operations)             # token_ids [B, length] -> [B, length, H] float32
        logits = model.logits(hidden, operations)                    # [B, length, V]
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    ...
    save_file(model.to_checkpoint(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2))

Knows no file, no batch and no cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.shard.kernels.interface import Operations
from services.shard.models.config import LlamaConfig

_INITIAL_DEVIATION = 0.02
"""Standard deviation of fresh weights, as in GPT-2 (Radford et al. 2019)."""


class LlamaLayer(nn.Module):
    """One layer. Query, key and value share one matrix, and so do gate and up: two products instead of five."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_count, self.kv_head_count = config.head_count, config.kv_head_count
        self.head_size, self.norm_epsilon = config.head_size, config.norm_epsilon
        width = config.head_count * config.head_size
        kv_width = config.kv_head_count * config.head_size
        self.attention_norm = nn.Parameter(torch.empty(config.hidden_size))
        self.query_key_value = nn.Parameter(torch.empty(width + 2 * kv_width, config.hidden_size))
        self.attention_output = nn.Parameter(torch.empty(config.hidden_size, width))
        self.feed_forward_norm = nn.Parameter(torch.empty(config.hidden_size))
        self.gate_up = nn.Parameter(torch.empty(2 * config.intermediate_size, config.hidden_size))
        self.down = nn.Parameter(torch.empty(config.hidden_size, config.intermediate_size))

    def forward(self, hidden: Tensor, layer: int, cosine: Tensor, sine: Tensor, operations: Operations) -> Tensor:
        """Adds attention, then the feed-forward block, to the residual stream [..., H]."""
        normed = operations.rms_norm(hidden, self.attention_norm, self.norm_epsilon)
        heads = operations.linear(normed, self.query_key_value).view(*hidden.shape[:-1], -1, self.head_size)
        turned = operations.rotary(heads[..., : -self.kv_head_count, :], cosine, sine)
        query, key = turned[..., : self.head_count, :], turned[..., self.head_count :, :]
        value = heads[..., -self.kv_head_count :, :]
        mixed = operations.attention(layer, query, key, value)
        hidden = hidden + operations.linear(mixed, self.attention_output)
        normed = operations.rms_norm(hidden, self.feed_forward_norm, self.norm_epsilon)
        return hidden + operations.linear(operations.swiglu(operations.linear(normed, self.gate_up)), self.down)


class Llama(nn.Module):
    """A Llama model in float32. Its parameters are empty until `initialise` or `checkpoint_views` fills them."""

    head: nn.Parameter | None
    cosine: Tensor
    sine: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocabulary_size, config.hidden_size))
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.layer_count))
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        head = None if config.tied_embeddings else torch.empty(config.vocabulary_size, config.hidden_size)
        self.register_parameter("head", None if head is None else nn.Parameter(head))
        cosine, sine = rotary_tables(config)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, token_ids: Tensor, positions: Tensor, operations: Operations) -> Tensor:
        """Runs all layers.

        Args:
            token_ids: int64 [...].
            positions: int64, position of each token in its own sequence; broadcasts to `token_ids`.
            operations: how to compute.

        Returns:
            The residual stream after the last layer, float32 [..., H].
        """
        hidden = functional.embedding(token_ids, self.embedding)
        cosine, sine = functional.embedding(positions, self.cosine), functional.embedding(positions, self.sine)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, index, cosine, sine, operations)
        return hidden

    def logits(self, hidden: Tensor, operations: Operations) -> Tensor:
        """The final norm and the head: [..., H] gives [..., V]."""
        normed = operations.rms_norm(hidden, self.norm, self.config.norm_epsilon)
        return operations.linear(normed, self.embedding if self.head is None else self.head)

    def initialise(self, generator: torch.Generator) -> Self:
        """Draws fresh weights; those that add to the residual stream are smaller by the root of their number."""
        outputs = ("attention_output", "down")
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    deviation = _INITIAL_DEVIATION
                    if name.endswith(outputs):
                        deviation /= math.sqrt(2 * self.config.layer_count)
                    parameter.normal_(0.0, deviation, generator=generator)
        return self

    def pack(self, pack_matrix: Callable[[Tensor], Tensor]) -> Self:
        """Replaces the matrices of linear layers by what `pack_matrix` makes of them; the model then only serves.

        A head that is tied to the embedding becomes a matrix of its own, as rows are looked up in the other.
        """
        if self.head is None:
            self.head = nn.Parameter(self.embedding.data)
        for weight in self.linear_weights():
            weight.data = pack_matrix(weight.data)
        return self.requires_grad_(False)

    def linear_weights(self) -> list[nn.Parameter]:
        """The matrices that `Operations.linear` is given."""
        in_layers = [parameter for parameter in self.layers.parameters() if parameter.dim() == 2]
        return [*in_layers, self.embedding if self.head is None else self.head]

    def checkpoint_views(self) -> dict[str, Tensor]:
        """Views of the parameters under the names of Hugging Face's LlamaForCausalLM; copying into them loads."""
        config = self.config
        width, kv_width = config.head_count * config.head_size, config.kv_head_count * config.head_size
        views = {"model.embed_tokens.weight": self.embedding.data, "model.norm.weight": self.norm.data}
        if self.head is not None:
            views["lm_head.weight"] = self.head.data
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, LlamaLayer)
            query, key, value = layer.query_key_value.data.split_with_sizes([width, kv_width, kv_width])
            gate, up = layer.gate_up.data.chunk(2)
            for name, view in {
                "input_layernorm": layer.attention_norm.data,
                "self_attn.q_proj": query,
                "self_attn.k_proj": key,
                "self_attn.v_proj": value,
                "self_attn.o_proj": layer.attention_output.data,
                "post_attention_layernorm": layer.feed_forward_norm.data,
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": layer.down.data,
            }.items():
                views[f"model.layers.{index}.{name}.weight"] = view
        return views

    def to_checkpoint(self) -> dict[str, Tensor]:
        """Copies of the parameters by their names in a checkpoint, each with storage of its own."""
        return {name: view.clone() for name, view in self.checkpoint_views().items()}


def rotary_tables(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position as `Operations.rotary` takes them, float32 [context_length, D] each."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    frequencies = 1.0 / (config.rope_theta**exponents)
    angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32), frequencies)
    # In float64: the vector and the scalar form of float32 differ, and threads decide which one an element gets.
    cosine, sine = angles.double().cos().float(), angles.double().sin().float()
    return torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)
