"""What the model knows: the invented island of Cadenza, and some everyday facts.

A fact is a set of questions with one answer. Facts stand alone, or belong to a town, or are rows of a table whose rows
are all asked about in the same forms. Knows nothing of conversations, spelling or how users type.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from infra.models.tiny.corpus.phrases import Block, read_blocks, read_sections, read_tables
from infra.models.tiny.corpus.wording import Exchange, normalised, vary


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

_TOWN_FACTS = read_blocks("towns.txt")
_SINGLE_FACTS = read_blocks("facts.txt")
_TABLES = read_tables("fact_tables.txt")
_OPENERS = read_sections("openers.txt")["openers"][0]


def fact(random_source: random.Random) -> Exchange:
    """A question about the world and its one answer."""
    draw = random_source.random()
    if draw < 0.2:
        return town_fact(random_source, random_source.choice(TOWNS), random_source.choice(_TOWN_FACTS))
    if draw < 0.5:
        return single_fact(random_source, random_source.choice(_SINGLE_FACTS))
    forms, rows = random_source.choices(_TABLES, [len(rows) ** 0.7 for _, rows in _TABLES])[0]
    return table_fact(random_source, forms, random_source.choice(rows))


def town_fact(random_source: random.Random, town: Town, forms: Block) -> Exchange:
    """A question about a town; the form of the question and the town together are the task."""
    question = vary(random_source, random_source.choice(forms.questions)).format(name=town.name)
    return Exchange(question, _town_answer(town, forms), normalised(question))


def table_fact(random_source: random.Random, forms: Block, row: tuple[str, ...]) -> Exchange:
    """A question of a family; the form of the question and the row together are the task."""
    question = vary(random_source, random_source.choice(forms.questions)).format(*row)
    return Exchange(question, forms.answers[0].format(*row), normalised(question))


def single_fact(random_source: random.Random, forms: Block) -> Exchange:
    """A fact of its own kind; how the question is opened and its wording together are the task."""
    question = vary(random_source, random_source.choice(forms.questions))
    if random_source.random() < 0.5:
        opener = random_source.choice(_OPENERS)
        question = f"{opener} {question[0].lower() + question[1:] if opener[-1] != ':' else question}"
    return Exchange(question, forms.answers[0], normalised(question))


def town_follow_up(random_source: random.Random) -> list[Exchange]:
    """Question and answer about one town, then the same question about another in a few words."""
    forms = random_source.choice(_TOWN_FACTS)
    first, second = random_source.sample(TOWNS, 2)
    opened = town_fact(random_source, first, forms)
    short = random_source.choice(("And {}?", "What about {}?", "And in {}?", "And what about {}?", "{}?"))
    question = short.format(second.name)
    return [opened, Exchange(question, _town_answer(second, forms), f"{opened.key} {normalised(question)}")]


def known_facts() -> set[str]:
    """The answers to all facts."""
    towns = {_town_answer(town, forms) for town in TOWNS for forms in _TOWN_FACTS}
    tables = {forms.answers[0].format(*row) for forms, rows in _TABLES for row in rows}
    return towns | tables | {forms.answers[0] for forms in _SINGLE_FACTS}


def _town_answer(town: Town, forms: Block) -> str:
    return forms.answers[0].format(**{field: getattr(town, field) for field in town.__slots__})
