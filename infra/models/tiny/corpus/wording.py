"""One wording of the many that a phrase stands for: alternatives drawn, slots filled.

Knows no kind of conversation, and nothing of how users type (`voice.py`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import NamedTuple

from infra.models.tiny.corpus import words
from infra.models.tiny.corpus.phrases import Block

_ALTERNATION = re.compile(r"\(([^()]*\|[^()]*)\)")
_SPACE_BEFORE_MARK = re.compile(r" +([,.!?])")
_SPACES = re.compile(" {2,}")


class Exchange(NamedTuple):
    """One turn of a user and the answer.

    Attributes:
        user: what the user says, well written; a NUL stands for `quoted`.
        assistant: the answer.
        key: what makes it the same task again, whatever the wording around it: exchanges are held out by it.
        quoted: words of the user that the answer depends on to the letter, so that they are never misspelled.
    """

    user: str
    assistant: str
    key: str
    quoted: str = ""


QUOTED = "\0"
"""Stands for `Exchange.quoted` in a user's turn."""


class Slots(dict[str, str]):
    """Values of the slots of an exchange, each drawn when it is first asked for.

    `{a_animal}` is the value of `{animal}` with its article, `{Animal}` the same with a capital, `{A_animal}` both;
    `{animal2}` is another one. Values that are given come first.
    """

    def __init__(self, random_source: random.Random, given: Mapping[str, str] | None = None) -> None:
        super().__init__(given or {})
        self._random_source = random_source

    def __missing__(self, slot: str) -> str:
        if slot.startswith(("a_", "A_")):
            value = words.with_article(self[slot[2:]])
            value = _capitalised(value) if slot[0] == "A" else value
        elif slot[0].isupper():
            value = _capitalised(self[slot[0].lower() + slot[1:]])
        else:
            value = words.of_kind(self._random_source, slot.rstrip("23456"))
            while value in self.values():
                value = words.of_kind(self._random_source, slot.rstrip("23456"))
        self[slot] = value
        return value

    def fill(self, text: str) -> str:
        """Draws among the alternatives of a text and fills its slots."""
        return _tidied(vary(self._random_source, text).format_map(self))


def vary(random_source: random.Random, text: str) -> str:
    """Draws one of each `(a|b|c)`."""
    return _tidied(_ALTERNATION.sub(lambda match: random_source.choice(match[1].split("|")), text))


def exchange(random_source: random.Random, block: Block, slots: Slots | None = None) -> Exchange:
    """Draws a question and an answer of a block, with values for their slots that may be drawn already."""
    slots = Slots(random_source) if slots is None else slots
    question = slots.fill(random_source.choice(block.questions))
    return Exchange(question, slots.fill(random_source.choice(block.answers)), normalised(question))


def normalised(text: str) -> str:
    """A text without its capitals, marks and spare spaces: what all ways of typing it have in common."""
    return " ".join(re.findall(r"[a-z0-9+*/=-]+", text.lower().replace("'", ""))) or text


def _tidied(text: str) -> str:
    """Without the spaces that an empty alternative leaves behind."""
    return _SPACES.sub(" ", _SPACE_BEFORE_MARK.sub(r"\1", text)).strip()


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
