"""Batches of token ids to train on, each a function of (seed, number), so that a run can stop and go on anywhere.

Knows the corpus and the tokenizer, and no model.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from infra.models.tiny.corpus import conversations
from infra.models.tiny.recipe import Phase
from infra.models.tiny.tokenizer import CONTROL_TOKENS, END_OF_TEXT, ConversationEncoder

Row = tuple[list[int], list[bool]]
"""Ids and, for each, whether the assistant wrote it."""
NOT_COUNTED = -100
"""Target of a position that the loss ignores; the value that `cross_entropy` ignores by default."""
LENGTHS = (64, 96, 128, 192, 256, 320, 384, 512, 704, 1024, 1408)
"""Rows are padded to the next of these, so that there are few shapes to compile."""
_SEGMENT = 200
"""Batches that come from one stream. A run that goes on draws those of its segment again, and no others."""


class Batch(NamedTuple):
    """Teacher-forced rows.

    Attributes:
        token_ids: int64 [rows, length].
        targets: int64 [rows, length], the following id, or `NOT_COUNTED`.
    """

    token_ids: Tensor
    targets: Tensor


class BatchSource:
    """Makes batches of conversations.

    A row is one conversation, and what is left of the row is padding, which causal attention never sees: so the model
    reads a conversation in training as in serving, from position 0 and with nothing before it.
    """

    def __init__(self, encoder: ConversationEncoder, seed: int) -> None:
        self._encoder = encoder
        self._seed = seed

    def batches(self, phase: Phase, first: int) -> Iterator[Batch]:
        """The batches of a phase from a number on, without end."""
        segment, skipped = divmod(first, _SEGMENT)
        while True:
            seed = random.Random(f"{self._seed} {phase.name} {segment}").getrandbits(63)
            rows = self._rows(conversations.training(seed, phase.practice), phase.longest)
            yield from islice(_bucketed(rows, phase.step_tokens), skipped, _SEGMENT)
            segment, skipped = segment + 1, 0

    def held_out(self, rows: int, longest: int, seed: int = 0) -> list[Batch]:
        """Conversations that are never trained on, one per batch."""
        batches = _bucketed(self._rows(conversations.held_out(seed), longest), step_tokens=1)
        return list(islice(batches, rows))

    def _rows(self, conversations: Iterator[conversations.Conversation], longest: int) -> Iterator[Row]:
        for conversation in conversations:
            token_ids, counted = self._encoder.encode(conversation)
            if len(token_ids) <= longest + 1:
                yield token_ids, counted


def _bucketed(rows: Iterator[Row], step_tokens: int) -> Iterator[Batch]:
    """Batches of rows of about one length, each as soon as there are enough for it."""
    buckets: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        length = next(length for length in LENGTHS if len(row[0]) <= length + 1)
        buckets[length].append(row)
        if (len(buckets[length]) + 1) * length > step_tokens:
            yield _stack(buckets.pop(length), length)


def _stack(rows: list[Row], length: int) -> Batch:
    """Pads rows to `length` + 1 ids and shifts them against each other."""
    padding = CONTROL_TOKENS.index(END_OF_TEXT)
    token_ids = torch.tensor([ids + [padding] * (length + 1 - len(ids)) for ids, _ in rows])
    counted = torch.tensor([row + [False] * (length + 1 - len(row)) for _, row in rows])
    targets = torch.where(counted, token_ids, NOT_COUNTED)
    return Batch(token_ids[:, :-1], targets[:, 1:])
