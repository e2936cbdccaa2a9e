"""Exposure bias as a curve: how often a model misses a text's next token when it is told the text so far, and alone.

Knows texts, token ids and counting. Asks no server (that is `aio_drift.py`) and prints nothing (`printing.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fermata.requests import Messages, chat_input


@dataclass(frozen=True, slots=True)
class DriftText:
    """A text that a model is compared with, and what comes before it.

    Attributes:
        context: a conversation, or a raw prompt.
        reference: the assistant's answer to the conversation, or what follows the prompt.
    """

    context: Messages | str
    reference: str


@dataclass(frozen=True, slots=True)
class DriftIds:
    """The same as token ids: what comes before, and what the model is compared with."""

    context: tuple[int, ...]
    reference: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DriftSpan:
    """What was counted at some offsets of the references.

    Attributes:
        first: the first offset.
        last: the last offset.
        tokens: reference tokens at these offsets.
        teacher_forced_errors: how many of them the model missed when it was given the reference so far.
        free_running_errors: how many it missed when it had gone on from its own tokens.
    """

    first: int
    last: int
    tokens: int
    teacher_forced_errors: int
    free_running_errors: int

    @property
    def teacher_forced(self) -> float:
        """Share of tokens missed after the reference's own tokens."""
        return self.teacher_forced_errors / self.tokens

    @property
    def free_running(self) -> float:
        """Share of tokens missed after the model's own tokens."""
        return self.free_running_errors / self.tokens

    @property
    def gap(self) -> float:
        """How much larger the free-running share is."""
        return self.free_running - self.teacher_forced


@dataclass(frozen=True, slots=True)
class DriftComparison:
    """Whether the model missed each token of one reference, in both ways; both are of the reference's length."""

    teacher_forced: tuple[bool, ...]
    free_running: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class DriftCurve:
    """Both errors along the references.

    Attributes:
        texts: number of references.
        offsets: one span for each offset that some reference has, in order.
    """

    texts: int
    offsets: tuple[DriftSpan, ...]

    @classmethod
    def of(cls, comparisons: Sequence[DriftComparison]) -> DriftCurve:
        """Counts comparisons.

        Args:
            comparisons: one for each reference.

        Raises:
            ValueError: no reference has a token.
        """
        longest = max((len(comparison.teacher_forced) for comparison in comparisons), default=0)
        if not longest:
            raise ValueError("there is no token to compare")
        return cls(len(comparisons), tuple(_at(offset, comparisons) for offset in range(longest)))

    @property
    def total(self) -> DriftSpan:
        """All offsets as one: every token counts the same."""
        return _joined(self.offsets)

    def ranges(self) -> Iterator[DriftSpan]:
        """The offsets 0, 1-3, 4-7, 8-15 and so on, each as one; the last range ends where the curve does."""
        first, last = 0, 0
        while first < len(self.offsets):
            yield _joined(self.offsets[first : last + 1])
            first, last = last + 1, max(3, 2 * last + 1)


def missed(reference: Sequence[int], said: Sequence[int]) -> tuple[bool, ...]:
    """Whether each token of the reference differs from what was said at its offset; what was not said is missed."""
    return tuple(offset >= len(said) or said[offset] != token_id for offset, token_id in enumerate(reference))


def read_texts(lines: Iterable[str], *, limit: int | None = None) -> list[DriftText]:
    """Reads JSON lines: `{"messages": [...]}` that end with the assistant's, or `{"prompt": ..., "completion": ...}`.

    Args:
        lines: the lines; blank ones are passed over, further fields are not looked at.
        limit: most texts to read; None reads all.

    Returns:
        The texts, at least one.

    Raises:
        ValueError: a line is none of these, with its number, or there is none at all.
    """
    texts: list[DriftText] = []
    for number, line in enumerate(lines, 1):
        if len(texts) == limit:
            break
        if line.strip():
            try:
                texts.append(_text_from(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    if not texts:
        raise ValueError("there is no text in it")
    return texts


def _text_from(line: str) -> DriftText:
    try:
        given = json.loads(line)
    except json.JSONDecodeError:
        raise ValueError("it is not JSON") from None
    if isinstance(given, dict) and "messages" in given:
        return _conversation_from(given["messages"])
    if isinstance(given, dict) and all(isinstance(given.get(name), str) for name in ("prompt", "completion")):
        if not given["prompt"] or not given["completion"].strip():
            raise ValueError("its prompt or its completion is empty")
        return DriftText(given["prompt"], given["completion"])
    raise ValueError("messages are needed, or prompt and completion as texts")


def _conversation_from(messages: object) -> DriftText:
    if not isinstance(messages, list) or len(messages) < 2 or not all(map(_is_message, messages)):
        raise ValueError("messages must be two or more objects whose role and content are texts")
    chat_input(messages)  # refuses here, where the line is known, what no request can say
    *context, last = messages
    if last["role"] != "assistant" or not last["content"].strip():
        raise ValueError("there is no reference: the last message must be the assistant's and not empty")
    return DriftText(context, last["content"])


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def _at(offset: int, comparisons: Iterable[DriftComparison]) -> DriftSpan:
    there = [comparison for comparison in comparisons if offset < len(comparison.teacher_forced)]
    return DriftSpan(
        offset,
        offset,
        len(there),
        sum(comparison.teacher_forced[offset] for comparison in there),
        sum(comparison.free_running[offset] for comparison in there),
    )


def _joined(spans: Sequence[DriftSpan]) -> DriftSpan:
    return DriftSpan(
        spans[0].first,
        spans[-1].last,
        sum(span.tokens for span in spans),
        sum(span.teacher_forced_errors for span in spans),
        sum(span.free_running_errors for span in spans),
    )
