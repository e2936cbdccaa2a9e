"""What a decoder-only transformer computes, as a value: sizes, and the few things in which families differ.

A family (`families/`) makes one from a `config.json`; whoever computes (`transformer.py` with its operations, or the
native kernels) reads it and knows no family's name. Knows no tensor and no file.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Activation(enum.Enum):
    """What turns the gate of the feed-forward block (Shazeer 2020)."""

    SILU = "silu"
    GELU_TANH = "gelu_pytorch_tanh"


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """All frequencies are divided by `factor` (Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies are divided by `factor`, high ones kept, those between blended (Llama 3.1, Dubey et al. 2024).

    Attributes:
        factor: of the low frequencies.
        low_frequency_factor: a wave longer than `original_context_length` over this is low.
        high_frequency_factor: a wave shorter than `original_context_length` over this is high.
        original_context_length: that the model was trained with before.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context_length: int


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021)."""

    theta: float = 10000.0
    scaling: LinearScaling | Llama3Scaling | None = None


@dataclass(frozen=True, slots=True)
class LayerKind:
    """In what the layers of one model differ.

    Attributes:
        rotary: how positions turn queries and keys.
        window: a query sees so many keys, itself included; None sees all.
    """

    rotary: Rotary = Rotary()
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder-only transformer with grouped-query attention (Ainslie et al. 2023) and RMSNorm.

    Attributes:
        family: its name among `families/`.
        vocabulary_size: number of token ids, V.
        hidden_size: width of the residual stream, H.
        intermediate_size: width of the feed-forward block, I.
        head_count: query heads.
        kv_head_count: heads of keys and values; divides `head_count`.
        head_size: width of one head, D; even.
        context_length: positions that the model knows.
        layers: the kind of each layer, first to last.
        norm_epsilon: added to the mean square in RMSNorm.
        attention_scale: factor of the scores.
        attention_bias: query, key and value have biases.
        output_bias: attention's output has one.
        feed_forward_bias: gate, up and down have biases.
        query_key_norm: each head of query and key is normalised (RMSNorm over D) before it is turned.
        post_norms: attention's and the feed-forward block's outputs are normalised before they are added.
        norm_offset: added to the stored weights of all norms (Gemma stores w - 1).
        activation: of the gate.
        attention_softcap: scores s become c * tanh(s / c).
        logit_softcap: logits likewise.
        embedding_scale: factor of the embedding where it enters the first layer.
        tied_embeddings: the head uses the embedding's matrix.
    """

    family: str
    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    head_count: int
    kv_head_count: int
    head_size: int
    context_length: int
    layers: tuple[LayerKind, ...]
    norm_epsilon: float = 1e-6
    attention_scale: float
    attention_bias: bool = False
    output_bias: bool = False
    feed_forward_bias: bool = False
    query_key_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    activation: Activation = Activation.SILU
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    tied_embeddings: bool = False

    @property
    def layer_count(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The different ones, in the order of the layers that come first with them."""
        return tuple(dict.fromkeys(kind.rotary for kind in self.layers))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The different ones, in the order of the layers that come first with them."""
        return tuple(dict.fromkeys(kind.window for kind in self.layers))
