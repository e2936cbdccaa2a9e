"""Rows of token ids to train on, each a function of (seed, number), so that a run can stop and go on anywhere.

Knows the corpus and the tokenizer, and no model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from infra.models.tiny import corpus
from infra.models.tiny.tokenizer import CONTROL_TOKENS, TURN_END, ConversationEncoder

NOT_COUNTED = -100
"""Target of a position that the loss ignores; the value that `cross_entropy` ignores by default."""


class Batch(NamedTuple):
    """Teacher-forced rows.

    Attributes:
        token_ids: int64 [rows, length].
        targets: int64 [rows, length], the following id, or `NOT_COUNTED`.
    """

    token_ids: Tensor
    targets: Tensor


class BatchSource:
    """Makes batches of conversations and of copy problems."""

    def __init__(self, encoder: ConversationEncoder, vocabulary_size: int, seed: int) -> None:
        self._encoder = encoder
        self._vocabulary_size = vocabulary_size
        self._seed = seed

    def batch(self, number: int, rows: int, length: int, copy_share: float) -> Batch:
        """The batch of this number; `copy_share` of its rows are copy problems."""
        first = number * rows
        built = []
        for row in range(first, first + rows):
            seed = hash_seed(self._seed, row, length)
            copies = random.Random(seed).random() < copy_share
            built.append(self._copy_row(seed, length) if copies else self._row(corpus.training(seed), length))
        return _stack(built)

    def held_out(self, rows: int, length: int, seed: int = 0) -> Batch:
        """Conversations that are never trained on."""
        conversations = corpus.held_out(seed)
        return _stack([self._row(conversations, length) for _ in range(rows)])

    def _row(self, conversations: Iterator[corpus.Conversation], length: int) -> tuple[list[int], list[bool]]:
        """Conversations one after the other; a row begins with one, and the last is cut."""
        token_ids: list[int] = []
        counted: list[bool] = []
        while len(token_ids) <= length:
            more_ids, more_counted = self._encoder.encode(next(conversations))
            token_ids += more_ids
            counted += more_counted
        return token_ids[: length + 1], counted[: length + 1]

    def _copy_row(self, seed: int, length: int) -> tuple[list[int], list[bool]]:
        separator = CONTROL_TOKENS.index(TURN_END)
        return next(corpus.copy_rows(seed, self._vocabulary_size, separator, length + 1))


def hash_seed(seed: int, row: int, length: int) -> int:
    """One seed for each row of each length."""
    return random.Random(f"{seed} {row} {length}").getrandbits(63)


def _stack(rows: list[tuple[list[int], list[bool]]]) -> Batch:
    token_ids = torch.tensor([row for row, _ in rows])
    counted = torch.tensor([row for _, row in rows])
    targets = torch.where(counted, token_ids, NOT_COUNTED)
    return Batch(token_ids[:, :-1], targets[:, 1:])
