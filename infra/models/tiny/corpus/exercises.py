"""Exercises with one right answer: counting, sums, repeating, spelling, words of a phrase, lists.

Knows nothing of how users type and of rendering. What the user says is copied to the letter where it is `quoted`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import cycle, islice

from infra.models.tiny.corpus import words
from infra.models.tiny.corpus.phrases import read_sections
from infra.models.tiny.corpus.wording import QUOTED, Exchange, normalised, vary

_FORMS = {title: blocks[0] for title, blocks in read_sections("exercises.txt").items()}
_OPERATIONS = {"+": "plus", "-": "minus", "*": "times"}
_STEPS = {"twos": 2, "fives": 5, "tens": 10, "2s": 2, "5s": 5, "10s": 10, "threes": 3}
LONGEST_PHRASE = 12
"""Words of the longest phrase that users want to hear again."""


def counting(random_source: random.Random) -> Exchange:
    """Counting up, down or in steps, and neighbours of a number."""
    draw = random_source.random()
    if draw < 0.55:
        return counting_up(random_source)
    if draw < 0.75:
        first = random_source.randint(3, 20)
        spoken = _number(random_source, first)
        return _asked(random_source, "count down", _joined(range(first, 0, -1)), spoken, key=f"count down {first}")
    if draw < 0.85:
        name = random_source.choice(tuple(_STEPS))
        step = _STEPS[name]
        last = step * random_source.randint(3, 12)
        return _asked(random_source, "count by", _joined(range(step, last + 1, step)), last, name)
    kind = random_source.choice(("after", "before"))
    number = random_source.randint(1, 99)
    neighbour = number + 1 if kind == "after" else number - 1
    return _asked(random_source, "neighbour", f"{neighbour} comes {kind} {number}.", kind, number)


def counting_up(random_source: random.Random) -> Exchange:
    """Counting from one number to another; the pair is the task."""
    if random_source.random() < 0.4:
        first, last = 1, random_source.randint(2, 30 if random_source.random() < 0.8 else 60)
        title, values = "count to", [_number(random_source, last)]
    else:
        first = random_source.randint(0, 20 if random_source.random() < 0.6 else 90)
        last = first + random_source.randint(2, 20 if random_source.random() < 0.4 else 10)
        title, values = "count between", [_number(random_source, first), _number(random_source, last)]
    return _asked(random_source, title, _joined(range(first, last + 1)), *values, key=f"count {first} {last}")


def small_sum(random_source: random.Random) -> Exchange:
    """Addition and subtraction up to twenty and products up to ten, in digits or in words."""
    if random_source.random() < 0.55:
        return digit_sum(random_source)
    operation = random_source.choice("+--*")
    first, second = random_source.randint(0, 10), random_source.randint(0, 10)
    if operation == "-":
        first += second if random_source.random() < 0.7 else 0
        first, second = max(first, second), min(first, second)
    if operation == "+" and random_source.random() < 0.5:
        first += 10
    return _sum(random_source, operation, first, second)


def digit_sum(random_source: random.Random) -> Exchange:
    """Addition of two single digits."""
    return _sum(random_source, "+", random_source.randint(0, 9), random_source.randint(0, 9))


def _sum(random_source: random.Random, operation: str, first: int, second: int) -> Exchange:
    result = {"+": first + second, "-": first - second, "*": first * second}[operation]
    spoken = _OPERATIONS[operation]
    answer = f"{first} {spoken} {second} is {result}."
    if operation == "+" and random_source.random() < 0.25:
        return _asked(random_source, "added", answer, first, second)
    draw = random_source.random()
    if draw < 0.2 and max(first, second) <= 20:
        problem = f"{words.NUMBER_WORDS[first]} {spoken} {words.NUMBER_WORDS[second]}"
    elif draw < 0.6:
        problem = f"{first} {spoken} {second}"
    else:
        sign = random_source.choice("*x") if operation == "*" else operation
        problem = f"{first}{sign}{second}" if random_source.random() < 0.35 else f"{first} {sign} {second}"
    return _asked(random_source, "sum", answer, problem)


def repeating(random_source: random.Random) -> Exchange:
    """Says again what the user said."""
    if random_source.random() < 0.05:
        word, count = words.any_word(random_source), random_source.randint(2, 5)
        times = random_source.choice((str(count), words.NUMBER_WORDS[count]))
        return _quoted(random_source, "say often", " ".join([word] * count), word, times)
    said = phrase(random_source, random_source.randint(1, LONGEST_PHRASE))
    return _quoted(random_source, "repeat quoted" if random_source.random() < 0.15 else "repeat", said, said)


def word_of_phrase(random_source: random.Random) -> Exchange:
    """The first or the last word of a phrase, or all of them backward."""
    title = random_source.choice(("first word", "last word", "backward"))
    said = [words.any_word(random_source) for _ in range(random_source.randint(2, 6))]
    answer = {"first word": said[0], "last word": said[-1], "backward": " ".join(reversed(said))}[title]
    return _quoted(random_source, title, answer, " ".join(said))


def phrase(random_source: random.Random, length: int) -> str:
    """Words to say again or to remember: in no order, mostly in lower case, sometimes with numbers and marks."""
    said = " ".join(
        str(random_source.randint(0, 999)) if random_source.random() < 0.07 else words.any_word(random_source)
        for _ in range(length)
    )
    draw = random_source.random()
    if draw < 0.2:
        said = said.capitalize()
    elif draw < 0.25:
        said = said.title()
    elif draw < 0.28:
        said = said.upper()
    elif draw < 0.36 and length > 2:
        said = said.replace(" ", ", ")
    return said + random_source.choice(".!?") if random_source.random() < 0.1 else said


def spelling(random_source: random.Random) -> Exchange:
    """Letters of a word, how it begins and ends, how many there are."""
    word = random_source.choice(words.LISTED_WORDS)
    draw = random_source.random()
    if draw < 0.12:
        return _asked(random_source, "first letter", f"The word {word} starts with {word[0].upper()}.", word)
    if draw < 0.2:
        return _asked(random_source, "last letter", f"The word {word} ends with {word[-1].upper()}.", word)
    if draw < 0.28:
        return _asked(random_source, "letter count", f"The word {word} has {len(word)} letters.", word)
    return _asked(random_source, "spell", "-".join(word.upper()) + ".", word)


def listing(random_source: random.Random) -> Exchange:
    """A numbered list of different things of a kind, or a choice among them.

    Things are listed in the order of their word list, from any of them on: a model can then know what comes next, and
    says nothing twice.
    """
    kind = random_source.choice(tuple(words.CATEGORIES))
    draw = random_source.random()
    if draw < 0.15:
        two = random_source.sample(words.CATEGORIES[kind], 2)
        chosen = random_source.choice(_FORMS["chosen"]).format(random_source.choice(two))
        return _asked(random_source, "choose", chosen, *two)
    if draw < 0.25:
        thing = random_source.choice(words.CATEGORIES[kind])
        return _asked(random_source, "one", f"How about {thing}?", words.SINGULARS[kind])
    if draw < 0.33:
        first = random_source.randint(0, 10)
        last = first + random_source.randint(3, 90)
        return _asked(random_source, "random", f"{random_source.randint(first, last)}", first, last)
    count = random_source.randint(2, 8)
    first = random_source.randrange(len(words.CATEGORIES[kind]))
    things = list(islice(cycle(words.CATEGORIES[kind]), first, first + count))
    title, answer = "list", "\n".join(f"{index}. {thing}" for index, thing in enumerate(things, 1))
    if random_source.random() < 0.15:
        title, answer = "line", ", ".join(things)
    return _asked(random_source, title, answer, _number(random_source, count), kind)


def _asked(random_source: random.Random, title: str, answer: str, *values: object, key: str = "") -> Exchange:
    """An exchange whose question has one of the forms of a kind."""
    question = vary(random_source, random_source.choice(_FORMS[title])).format(*values)
    return Exchange(question, answer, key or normalised(question))


def _quoted(random_source: random.Random, title: str, answer: str, said: str, *values: object) -> Exchange:
    """An exchange about words of the user; the words are the task."""
    form = vary(random_source, random_source.choice(_FORMS[title])).format(*values)
    question = form.replace("*", QUOTED) if "*" in form else f"{form} {QUOTED}"
    return Exchange(question, answer, f"{title} {said}", said)


def _number(random_source: random.Random, number: int) -> str:
    """A number in digits, or sometimes, up to twenty, as a word."""
    return words.NUMBER_WORDS[number] if number <= 20 and random_source.random() < 0.2 else str(number)


def _joined(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers)) + "."
