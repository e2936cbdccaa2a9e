"""What the model knows: the invented island of Cadenza, and some everyday facts.

A fact is a set of questions with one answer. Knows nothing of conversations, spelling or noise. The things asked about
that are *not* here (`unknown_question`) share the questions' forms, so that a model has to know what it knows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from infra.models.tiny import words
from infra.models.tiny.phrases import Exchange, read_exchanges


@dataclass(frozen=True, slots=True)
class Town:
    """A town of the island, one fact per field."""

    name: str
    mayor: str
    dish: str
    craft: str
    animal: str
    color: str
    season: str
    bridges: str
    region: str


TOWNS = (
    Town("Solfa", "Mabel Reed", "honey cake", "bells", "swan", "blue", "spring", "seven", "in the middle"),
    Town("Largo", "Otto Plum", "pumpkin soup", "clocks", "turtle", "green", "autumn", "two", "in the south"),
    Town("Presto", "Rosa Quick", "pepper noodles", "kites", "hare", "red", "summer", "nine", "in the east"),
    Town("Lento", "Gus Moss", "mushroom stew", "blankets", "snail", "brown", "winter", "one", "in the west"),
    Town("Vivace", "Lola Finch", "lemon pie", "drums", "squirrel", "orange", "summer", "four", "on the east coast"),
    Town("Dolce", "Basil Bloom", "plum jam", "chocolate", "bee", "pink", "spring", "three", "in the north"),
    Town("Minuet", "Clara Step", "pear tart", "shoes", "heron", "white", "winter", "six", "on the west coast"),
    Town("Nocturne", "Hugo Night", "black bread", "lanterns", "owl", "silver", "autumn", "five", "on the north coast"),
    Town("Ballade", "Edith Page", "onion bread", "books", "fox", "gold", "autumn", "eight", "by the lake"),
    Town("Forte", "Walter Stone", "bean stew", "hammers", "bear", "gray", "winter", "ten", "on the mountain"),
)

_TOWN_FACTS = read_exchanges("towns.txt")
_SINGLE_FACTS = read_exchanges("facts.txt")
_UNKNOWN = read_exchanges("unknown.txt")[0]


def known_facts() -> list[tuple[tuple[str, ...], str]]:
    """All facts as (questions, answer)."""
    facts = [
        (tuple(form.format(name=town.name) for form in fact.questions), _town_answer(town, fact))
        for town in TOWNS
        for fact in _TOWN_FACTS
    ]
    return facts + [(fact.questions, fact.answers[0]) for fact in _SINGLE_FACTS]


def town_follow_up(random_source: random.Random) -> list[tuple[str, str]]:
    """Question and answer about one town, then the same question about another in a few words."""
    fact = random_source.choice(_TOWN_FACTS)
    first, second = random_source.sample(TOWNS, 2)
    short = random_source.choice(("And {name}?", "What about {name}?", "And in {name}?", "And what about {name}?"))
    return [
        (random_source.choice(fact.questions).format(name=first.name), _town_answer(first, fact)),
        (short.format(name=second.name), _town_answer(second, fact)),
    ]


def unknown_question(random_source: random.Random) -> tuple[str, str]:
    """A question whose answer is not known here, and an answer that says so."""
    place = (
        words.invented_name(random_source) if random_source.random() < 0.6 else random_source.choice(words.REAL_PLACES)
    )
    word = words.any_word(random_source)
    question = random_source.choice(_UNKNOWN.questions).format(
        word=word,
        a_word=words.with_article(word),
        place=place,
        person=random_source.choice(words.NAMES),
        surname=words.invented_name(random_source),
        year=random_source.randint(1000, 2030),
    )
    return question, random_source.choice(_UNKNOWN.answers)


def _town_answer(town: Town, fact: Exchange) -> str:
    return fact.answers[0].format(**{field: getattr(town, field) for field in town.__slots__})
