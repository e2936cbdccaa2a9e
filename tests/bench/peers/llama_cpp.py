"""The worker of llama.cpp, driven through its C interface as its own batched example does; arg-max in NumPy.

The Python package only carries the library; nothing else of it is on the path.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.peers import worker

MOST_SEQUENCES = 64
CONTEXT = 16384
"""Positions of all sequences together."""
BATCH = 4096
"""Tokens per call."""


class _Model:
    """A loaded model with one context whose cache all sequences share."""

    def __init__(self, path: Path, threads: int) -> None:
        self._library: Any = importlib.import_module("llama_cpp")
        self._numpy: Any = importlib.import_module("numpy")
        library = self._library
        library.llama_backend_init()
        self._model = library.llama_model_load_from_file(bytes(path), library.llama_model_default_params())
        self._width = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        parameters = library.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = CONTEXT, BATCH, 1024
        parameters.n_seq_max = MOST_SEQUENCES
        parameters.kv_unified = True
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = 1
        self._context = library.llama_init_from_model(self._model, parameters)
        self._batch = library.llama_batch_init(BATCH, 0, 1)

    def generate(self, prompts: list[list[int]], count: int) -> Sequence[Sequence[int]]:
        """Prompts first, as many at a time as fit a call; then one token of each sequence per call."""
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        length = len(prompts[0])
        drawn: list[list[int]] = [[] for _ in prompts]
        at_once = BATCH // length
        for first in range(0, len(prompts), at_once):
            some = range(first, min(first + at_once, len(prompts)))
            entries = [(token, at, index) for index in some for at, token in enumerate(prompts[index])]
            self._decode(entries, {index: (index - first + 1) * length - 1 for index in some}, drawn)
        for position in range(length, length + count - 1):
            entries = [(ids[-1], position, index) for index, ids in enumerate(drawn)]
            self._decode(entries, {index: index for index in range(len(drawn))}, drawn)
        return drawn

    def _decode(self, entries: list[tuple[int, int, int]], last: dict[int, int], drawn: list[list[int]]) -> None:
        """Computes (token, position, sequence) entries; draws for each sequence at its entry in `last`."""
        batch, wanted = self._batch, set(last.values())
        batch.n_tokens = len(entries)
        for index, (token, position, sequence) in enumerate(entries):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = index in wanted
        if status := self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode: {status}")
        for sequence, index in last.items():
            logits = self._library.llama_get_logits_ith(self._context, index)
            row = self._numpy.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._width,))
            drawn[sequence].append(int(row.argmax()))


def load(path: Path, precision: str, threads: int) -> worker.Generate:
    """Loads a GGUF file, which has its precision in it."""
    return _Model(path, threads).generate


if __name__ == "__main__":
    worker.main(load, "llama-cpp-python")
