"""Computes a step: a batch of token ids in, logits out.

Loads the model and hands it to the kernels of this machine (`kernels/`). The numbers keep R23: a row's logits depend on
the tokens before it and on the weights, and on nothing else.
Knows block tables, but not who decided them; nothing of sequences and links, and of sampling only what it reads.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from services.common import sampling
from services.common.model_folder import hash_tokenizer, model_name
from services.common.types import Fingerprint
from services.shard import weights
from services.shard.kernels import choice
from services.shard.kernels.interface import Logits
from services.shard.scheduler import Batch, Chunk

_SELF_TEST_TOKENS = 81
"""More than one page, several query tiles, and one with a single query."""


class Runner:
    """A model in memory with its KV cache.

    Attributes:
        block_count: blocks of the KV cache.
        vocabulary_size: number of token ids, V.
        context_length: positions that the model knows.
        fingerprint: what another replica must have in common with this one for equal tokens (R20).
    """

    def __init__(
        self,
        folder: Path,
        *,
        block_size: int,
        kv_memory: int,
        threads: int,
        dtype: str = "auto",
        device: str = "cpu",
        kernels: str = "auto",
    ) -> None:
        """Loads the weights and allocates the pool.

        Args:
            folder: of the model.
            block_size: positions per KV block.
            kv_memory: bytes of the pool; 0 takes 25 % of the free memory, at most 1 GiB.
            threads: compute threads, of the whole process.
            dtype: what is computed in; see `weights.resolve_dtype`.
            device: "cpu", "cuda" or "cuda:N".
            kernels: "native", "plain", or "auto"; see `choice`.

        Raises:
            ValueError: the model is not one that can be served, or the pool is too small; the message says why.
        """
        torch.set_num_threads(threads)
        if device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"device: there is no {device}")
        dtype = weights.resolve_dtype(folder, dtype)
        model = weights.load_model(folder, dtype)
        self.vocabulary_size = model.architecture.vocabulary_size
        self.context_length = model.architecture.context_length
        self._block_size = block_size
        self._kernels = choice.choose(
            model,
            dtype,
            block_size=block_size,
            kv_memory=kv_memory,
            threads=threads,
            device=device,
            kernels=kernels,
        )
        self.block_count = self._kernels.cache.block_count
        self.fingerprint = Fingerprint(
            model=model_name(folder),
            weights=weights.hash_weights(folder),
            kernels=f"{self._kernels.name}:{torch.device(device).type}:{dtype}:{self._self_test()}",
            tokenizer=hash_tokenizer(folder),
        )

    def forward(self, batch: Batch) -> Logits:
        """Computes the chunks of a batch, after its copies of blocks.

        Args:
            batch: its token ids and positions are within the model's, its blocks within the pool; it may be empty.
                Without rows, all logits are given.
        """
        self._kernels.cache.copy(batch.copies)
        if not batch.chunks:
            return Logits(torch.empty(0, self.vocabulary_size))
        self._kernels.cache.reach(max(chunk.block_table[-1] for chunk in batch.chunks))
        if batch.rows:
            wanted = [sampling.reads_logits(row) for row in batch.rows]
        else:
            wanted = [True for chunk in batch.chunks if chunk.draws]
        return self._kernels.forward(batch, wanted)

    def _self_test(self) -> str:
        """Hash of the logits behind fixed ids: it differs where kernels, machines or threads give other bits."""
        count = min(_SELF_TEST_TOKENS, self.context_length, self.block_count * self._block_size)
        token_ids = [(index * 7919 + 1) % self.vocabulary_size for index in range(count)]
        table = list(range(-(-count // self._block_size)))
        logits = self.forward(Batch([Chunk(0, token_ids, table, draws=True)], []))
        return hashlib.sha256(logits.values.numpy().tobytes()).hexdigest()[:16]
