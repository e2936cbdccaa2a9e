"""How a session goes on (R17): where in the tree of its generations a new one begins, and which ids it adds.

Delivered tokens never change. If the new rendering starts with the log's own text, the log's ids stay as they are and
only the rest is encoded; else (a template that rewrites history, a stop string that was cut) the new generation
branches off where its own encoding stops being the log's. Pure; knows ids and texts, neither messages nor templates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Branch:
    """Where a generation begins: behind `count` output tokens of a choice. Empty at the root."""

    generation_id: str = ""
    choice: int = 0
    count: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """One generation on the way from the root to the place where the session goes on.

    Attributes:
        generation_id: its id.
        parent: where it begins.
        prompt_ids: the ids that it added.
        output_ids: all output ids of the choice that the session goes on from.
        continues_message: its output continues the message before it instead of being one of its own.
    """

    generation_id: str
    parent: Branch
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    continues_message: bool = False


class Continuation(NamedTuple):
    """Where a new generation begins.

    Attributes:
        parent: the branch.
        token_ids: the ids that it adds.
        position: length of the id sequence before them.
        kept: number of turns, from the root, that it goes on from; the others are replaced by `token_ids`.
    """

    parent: Branch
    token_ids: list[int]
    position: int
    kept: int


@dataclass(frozen=True, slots=True)
class _Span:
    """Where a turn's ids are in the sequence of the whole way: prompt [start, middle), output [middle, end)."""

    start: int
    middle: int
    end: int


def append_to(turns: Sequence[Turn], choice: int, token_ids: Sequence[int]) -> Continuation:
    """Adds ids behind all that a session has, as they are.

    Args:
        turns: root first, at least one.
        choice: of the last turn, to go on from.
        token_ids: to add.
    """
    last = turns[-1]
    position = len(sequence_of(turns))
    parent = Branch(last.generation_id, choice, len(last.output_ids))
    return Continuation(parent, list(token_ids), position, len(turns))


def continue_session(
    turns: Sequence[Turn],
    choice: int,
    rendered: str,
    *,
    first: int = 0,
    text_of: Callable[[Sequence[int]], bytes],
    encode: Callable[[str, bool], list[int]],
) -> Continuation:
    """Finds the place in a session where a newly rendered conversation goes on.

    Args:
        turns: root first, at least one.
        choice: of the last turn, to go on from.
        rendered: all messages of the turns from `first` on and the new ones, rendered.
        first: turns before it are not part of the rendering (raw prompts) and stay as they are.
        text_of: text of ids as UTF-8 bytes, in the same notation as `rendered`.
        encode: ids of a part of `rendered`; True when it follows other tokens.
    """
    sequence = sequence_of(turns)
    spans = _spans(turns)
    fixed = spans[first - 1].end if first else 0
    own_text = text_of(sequence[fixed:])
    text = rendered.encode()
    if text.startswith(own_text):
        rest = _decoded(text[len(own_text) :])
        if rest is not None:
            # An end that is cut inside a character would have been shown as U+FFFD, so the rest is whole here.
            return append_to(turns, choice, encode(rest, True) if rest else [])
    token_ids = encode(rendered, fixed > 0)
    common = fixed + _common_prefix(sequence[fixed:], token_ids)
    parent, position, kept = _branch_at(turns, spans, choice, common)
    return Continuation(parent, token_ids[position - fixed :], position, kept)


def sequence_of(turns: Sequence[Turn]) -> list[int]:
    """The whole id sequence of a way: of each turn the prompt and the output up to where the next one begins."""
    sequence: list[int] = []
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        sequence += turn.prompt_ids
        sequence += turn.output_ids if following is None else turn.output_ids[: following.parent.count]
    return sequence


def _branch_at(turns: Sequence[Turn], spans: Sequence[_Span], choice: int, common: int) -> tuple[Branch, int, int]:
    """The last place at or before `common` where a generation can begin: inside an output, or at the root.

    A turn that continues a message is never the first one replaced: its words alone are no message.

    Returns:
        The branch, its position, and the number of turns before it.
    """
    for index in reversed(range(len(turns))):
        following = turns[index + 1] if index + 1 < len(turns) else None
        if common >= spans[index].middle and not (following and following.continues_message):
            position = min(common, spans[index].end)
            taken = following.parent.choice if following else choice
            return Branch(turns[index].generation_id, taken, position - spans[index].middle), position, index + 1
    return Branch(), 0, 0


def _spans(turns: Sequence[Turn]) -> list[_Span]:
    spans: list[_Span] = []
    start = 0
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        middle = start + len(turn.prompt_ids)
        end = middle + (len(turn.output_ids) if following is None else following.parent.count)
        spans.append(_Span(start, middle, end))
        start = end
    return spans


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


def _decoded(text: bytes) -> str | None:
    """The text; None when it does not begin with a whole character."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None
