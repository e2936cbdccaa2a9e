"""The edits of logits that come before temperature: bias, bans and penalties (R22).

Order: logit_bias, allowed_token_ids, bad_words, min_tokens, repetition penalty, presence and frequency penalty. What an
edit computes, it computes in float64 and stores as float32. Ids outside the vocabulary are ignored.

Written for any array-API library; goes beyond the standard in one thing that the libraries share: assignment to the
elements that an integer array names. Knows nothing of temperature, filters and noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import array_api_compat
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from services.common.sampling import Row

Array: TypeAlias = Any


class _Edit(NamedTuple):
    """An operand for each of some distinct ids of one row."""

    token_ids: NDArray[np.int64]
    operands: NDArray[np.float64]


def needed(row: Row) -> bool:
    """Whether `apply` may change the row's logits."""
    program = row.program
    return bool(
        program.logit_bias
        or program.allowed_token_ids is not None
        or program.bad_words
        or program.repetition_penalty != 1.0
        or program.presence_penalty
        or program.frequency_penalty
        or (row.stop_token_ids and _is_too_short(row))
    )


def apply(logits: Array, rows: Sequence[Row]) -> None:
    """Edits logits in place.

    Args:
        logits: [R, V] float32, contiguous; row i belongs to `rows[i]`.
        rows: may include such as need no edit.
    """
    editor = _Editor(logits)
    editor.update(map(_bias, rows), lambda values, bias: values + bias)
    for index, row in enumerate(rows):
        if row.program.allowed_token_ids is not None:
            editor.keep_only(index, row.program.allowed_token_ids)
    editor.ban(map(banned, rows))
    editor.update(map(_repetition, rows), _divide)
    editor.update(map(_presence_and_frequency, rows), lambda values, amount: values - amount)


def banned(row: Row) -> set[int]:
    """Ids that must not come next: the ends of bad words that have begun, and stops that would come too early."""
    token_ids = row.token_ids
    result = set()
    for word in row.program.bad_words:
        head = len(word) - 1
        if 0 <= head <= len(token_ids) and all(token_ids[i - head] == word[i] for i in range(head)):
            result.add(word[-1])
    if _is_too_short(row):
        result.update(row.stop_token_ids)
    return result


def _is_too_short(row: Row) -> bool:
    return len(row.token_ids) - row.output_start < row.min_tokens


def _bias(row: Row) -> _Edit | None:
    bias = row.program.logit_bias
    if not bias:
        return None
    return _Edit(np.fromiter(bias.keys(), np.int64, len(bias)), np.fromiter(bias.values(), np.float64, len(bias)))


def _repetition(row: Row) -> _Edit | None:
    """The divisor of every id of the sequence (Keskar et al., "CTRL", 2019)."""
    penalty = row.program.repetition_penalty
    if penalty == 1.0:
        return None
    token_ids, counts = _occurrences(row.token_ids)
    return _Edit(token_ids, np.full(counts.shape, penalty))


def _presence_and_frequency(row: Row) -> _Edit | None:
    """What is subtracted for every id of this generation's output."""
    presence, frequency = row.program.presence_penalty, row.program.frequency_penalty
    if not presence and not frequency:
        return None
    token_ids, counts = _occurrences(row.token_ids[row.output_start :])
    return _Edit(token_ids, presence + frequency * counts.astype(np.float64))


def _occurrences(token_ids: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct ids and how often each occurs. An `array` costs a tenth of a list here."""
    counts = np.bincount(np.asarray(token_ids, dtype=np.int64))
    distinct = np.flatnonzero(counts)
    return distinct, counts[distinct]


def _divide(values: Array, penalty: Array) -> Array:
    """Makes a logit smaller whatever its sign, as transformers does."""
    xp = array_api_compat.array_namespace(values)
    return xp.where(values < 0, values * penalty, values / penalty)


class _Editor:
    """Gathers the edits of all rows into few array operations over the flattened logits."""

    def __init__(self, logits: Array) -> None:
        self._xp = array_api_compat.array_namespace(logits)
        self._device = array_api_compat.device(logits)
        self._logits = logits
        self._vocabulary_size: int = logits.shape[-1]
        self._cells = self._xp.reshape(logits, (-1,), copy=False)

    def update(self, edits: Iterable[_Edit | None], operation: Callable[[Array, Array], Array]) -> None:
        """Sets each named logit to `operation(logit, operand)`; one edit per row, in order."""
        named = [(index, edit) for index, edit in enumerate(edits) if edit is not None]
        if not named:
            return
        xp, where = self._xp, self._where([(index, edit.token_ids) for index, edit in named])
        operands = np.concatenate([edit.operands[edit.token_ids < self._vocabulary_size] for _, edit in named])
        values = operation(xp.astype(self._cells[where], xp.float64), xp.asarray(operands, device=self._device))
        self._cells[where] = xp.astype(values, xp.float32)

    def ban(self, bans: Iterable[set[int]]) -> None:
        """Makes ids impossible; one set per row, in order."""
        named = [(index, np.fromiter(ids, np.int64, len(ids))) for index, ids in enumerate(bans) if ids]
        if named:
            self._cells[self._where(named)] = -np.inf

    def keep_only(self, index: int, token_ids: Sequence[int]) -> None:
        """Makes all other ids of a row impossible."""
        where = self._where([(index, np.asarray(token_ids, np.int64))])
        kept = self._cells[where]
        self._logits[index, :] = -np.inf
        self._cells[where] = kept

    def _where(self, named: list[tuple[int, NDArray[np.int64]]]) -> Array:
        """Flat indices of the ids of some rows, without those outside the vocabulary."""
        size = self._vocabulary_size
        cells = np.concatenate([token_ids[token_ids < size] + index * size for index, token_ids in named])
        return self._xp.asarray(cells, device=self._device)
