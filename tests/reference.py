"""A Llama model in the simplest code that computes it: one sequence, no cache, no tiles, float32.

Everything that serves is held to this. It reads a checkpoint as Hugging Face writes it and shares no code with the
project, so that a mistake there cannot repeat itself here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


class Reference:
    """A model from a folder with `config.json` and `model.safetensors`."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Float32 logits [tokens, V] behind each token of a sequence."""
        embedding = self.tensors["model.embed_tokens.weight"]
        hidden = embedding[torch.tensor(token_ids)]
        for layer in range(self.config["num_hidden_layers"]):
            hidden = hidden + self._attention(layer, self._norm(f"layers.{layer}.input_layernorm", hidden))
            hidden = hidden + self._feed_forward(layer, self._norm(f"layers.{layer}.post_attention_layernorm", hidden))
        head = embedding if self.config["tie_word_embeddings"] else self.tensors["lm_head.weight"]
        return self._norm("norm", hidden) @ head.T

    def greedy(self, token_ids: Sequence[int], count: int) -> list[int]:
        """The `count` most probable tokens that follow, one after the other."""
        sequence = list(token_ids)
        for _ in range(count):
            sequence.append(int(self.logits(sequence)[-1].argmax()))
        return sequence[len(token_ids) :]

    def _linear(self, layer: int, name: str, rows: Tensor) -> Tensor:
        return rows @ self.tensors[f"model.layers.{layer}.{name}.weight"].T

    def _norm(self, name: str, rows: Tensor) -> Tensor:
        scale = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return rows * scale * self.tensors[f"model.{name}.weight"]

    def _feed_forward(self, layer: int, rows: Tensor) -> Tensor:
        gate, up = self._linear(layer, "mlp.gate_proj", rows), self._linear(layer, "mlp.up_proj", rows)
        return self._linear(layer, "mlp.down_proj", gate / (1 + torch.exp(-gate)) * up)

    def _attention(self, layer: int, rows: Tensor) -> Tensor:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        count, size = len(rows), self.config["head_dim"]
        query = self._linear(layer, "self_attn.q_proj", rows).view(count, heads, size)
        key = self._linear(layer, "self_attn.k_proj", rows).view(count, kv_heads, size)
        value = self._linear(layer, "self_attn.v_proj", rows).view(count, kv_heads, size)
        future = torch.ones(count, count, dtype=torch.bool).triu(1)
        mixed = []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = self._rotate(query[:, head]) @ self._rotate(key[:, shared]).T / math.sqrt(size)
            mixed.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value[:, shared])
        return self._linear(layer, "self_attn.o_proj", torch.cat(mixed, -1))

    def _rotate(self, head: Tensor) -> Tensor:
        """Turns the pairs (i, i + D/2) of row t by the angle t / theta^(2i/D)."""
        count, size = head.shape
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        angles = torch.arange(count)[:, None] / self.config["rope_parameters"]["rope_theta"] ** exponents
        first, second = head.chunk(2, -1)
        turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
        return torch.cat(turned, -1)
