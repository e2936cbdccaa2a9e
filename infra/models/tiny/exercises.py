"""Exercises with one right answer: counting, sums, repeating, spelling, lists.

Each is an exchange of (user, assistant) turns. Knows nothing of noise and of rendering.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from infra.models.tiny import words
from infra.models.tiny.phrases import read_sections
from infra.models.tiny.talk import Turns

_FORMS = {title: blocks[0] for title, blocks in read_sections("exercises.txt").items()}
_COUNTING_KINDS = ("to", "to", "between", "down", "after", "before")
_SIGNS = {"+": "plus", "-": "minus", "*": "times"}


def counting(random_source: random.Random) -> Turns:
    """Counting up or down, and neighbours of a number."""
    kind = random_source.choice(_COUNTING_KINDS)
    if kind == "to":
        last = random_source.randint(3, 20)
        return _asked(random_source, "count to", _joined(range(1, last + 1)), last)
    if kind == "between":
        first = random_source.randint(2, 80)
        last = first + random_source.randint(3, 10)
        return _asked(random_source, "count between", _joined(range(first, last + 1)), first, last)
    if kind == "down":
        first = random_source.randint(3, 15)
        return _asked(random_source, "count down", _joined(range(first, 0, -1)), first)
    number = random_source.randint(1, 99)
    neighbour = number + 1 if kind == "after" else number - 1
    return _asked(random_source, "neighbour", f"{neighbour} comes {kind} {number}.", kind, number)


def small_sum(random_source: random.Random) -> Turns:
    """Addition and subtraction up to twenty and products up to ten, in digits or in words."""
    operation = random_source.choice("+++--*")
    first, second = random_source.randint(0, 10), random_source.randint(0, 10)
    if operation == "-":
        first, second = max(first, second), min(first, second)
    result = {"+": first + second, "-": first - second, "*": first * second}[operation]
    spoken = _SIGNS[operation]
    if random_source.random() < 0.25:
        problem = f"{words.NUMBER_WORDS[first]} {spoken} {words.NUMBER_WORDS[second]}"
    else:
        problem = f"{first} {spoken if random_source.random() < 0.5 else operation} {second}"
    return _asked(random_source, "sum", f"{first} {spoken} {second} is {result}.", problem)


def repeating(random_source: random.Random) -> Turns:
    """Says again what the user said."""
    length = random_source.choice((1, 1, 2, 3, 4, 5, 6, 8, 10))
    phrase = " ".join(_phrase_word(random_source) for _ in range(length))
    return _asked(random_source, "repeat", phrase, phrase)


def spelling(random_source: random.Random) -> Turns:
    """Letters of a word, or how it begins."""
    word = random_source.choice(words.ALL_WORDS)
    if random_source.random() < 0.3:
        return _asked(
            random_source, "first letter", f"{word.capitalize()} starts with the letter {word[0].upper()}.", word
        )
    return _asked(random_source, "spell", "-".join(word.upper()) + ".", word)


def listing(random_source: random.Random) -> Turns:
    """A numbered list of different things of a kind, or a choice among them."""
    kind = random_source.choice(tuple(words.CATEGORIES))
    if random_source.random() < 0.25:
        two = random_source.sample(words.CATEGORIES[kind], 2)
        chosen = random_source.choice(_FORMS["chosen"]).format(random_source.choice(two))
        return _asked(random_source, "choose", chosen, *two)
    count = random_source.randint(2, 7)
    number = random_source.choice((str(count), words.NUMBER_WORDS[count]))
    things = random_source.sample(words.CATEGORIES[kind], count)
    if random_source.random() < 0.2:
        return _asked(random_source, "line", ", ".join(things), number, kind)
    numbered = "\n".join(f"{index}. {thing}" for index, thing in enumerate(things, 1))
    return _asked(random_source, "list", numbered, number, kind)


def _asked(random_source: random.Random, title: str, answer: str, *values: object) -> Turns:
    """An exchange whose question has one of the forms of a kind."""
    return [(random_source.choice(_FORMS[title]).format(*values), answer)]


def _joined(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers)) + "."


def _phrase_word(random_source: random.Random) -> str:
    if random_source.random() < 0.1:
        return str(random_source.randint(0, 999))
    return words.any_word(random_source)
