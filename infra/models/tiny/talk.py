"""Small talk: greetings, thanks, questions about the assistant, and what users say about themselves.

An exchange is a list of (user, assistant) turns. Knows nothing of other skills, of noise and of rendering.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from infra.models.tiny import words
from infra.models.tiny.phrases import Exchange, read_exchanges

Turns = list[tuple[str, str]]

ASSISTANT_NAME = "Fermata"

_EXCHANGES = read_exchanges("small_talk.txt")
_GREETINGS = _EXCHANGES[:5]
_KINDS = ("name", "favorite", "hobby", "pet", "home", "age", "job")
_STATEMENTS_AND_QUESTIONS = read_exchanges("about_users.txt")
_ABOUT_USERS = dict(
    zip(_KINDS, zip(*(_STATEMENTS_AND_QUESTIONS[part::2] for part in (0, 1)), strict=True), strict=True)
)
_FAVORITES = {
    "color": words.COLORS,
    "food": words.FOODS,
    "fruit": words.FRUITS,
    "sport": words.SPORTS,
    "drink": words.DRINKS,
    "flower": words.FLOWERS,
}
_KNOWN_NAME_SHARE = 0.6
"""The rest of the names is invented, so that they have to be copied."""


def greeting(random_source: random.Random) -> Turns:
    """An exchange that conversations begin with."""
    return _filled(random_source, random_source.choice(_GREETINGS), {})


def small_talk(random_source: random.Random, name: str = ASSISTANT_NAME) -> Turns:
    """One exchange of small talk; `name` is what the assistant is called."""
    return _filled(random_source, random_source.choice(_EXCHANGES), {"name": name})


def own_name(random_source: random.Random, name: str) -> Turns:
    """The assistant says its name, which a system turn may have given it."""
    about_names = [item for item in _EXCHANGES if "{name}" in item.answers[0]]
    return _filled(random_source, random_source.choice(about_names), {"name": name})


def story_offer(random_source: random.Random) -> Turns:
    """An exchange at whose end the assistant offers a story."""
    offers = [
        (question, answer)
        for questions, answers in _EXCHANGES
        for question in questions
        for answer in answers
        if answer.endswith("story?")
    ]
    return [random_source.choice(offers)]


def about_user(random_source: random.Random) -> tuple[Turns, Turns]:
    """What a user says about themself, and the question that asks for it later."""
    kind = random_source.choice(tuple(_ABOUT_USERS))
    values = _user_values(random_source, kind)
    statement, question = _ABOUT_USERS[kind]
    return _filled(random_source, statement, values), _filled(random_source, question, values)


def _filled(random_source: random.Random, exchange: Exchange, values: Mapping[str, str]) -> Turns:
    question, answer = random_source.choice(exchange.questions), random_source.choice(exchange.answers)
    return [(question.format(**values), answer.format(**values))]


def _user_values(random_source: random.Random, kind: str) -> dict[str, str]:
    """Draws what fills the forms of a kind of statement."""
    choose = random_source.choice
    match kind:
        case "name":
            return {"name": _any_name(random_source)}
        case "favorite":
            favorite = choose(tuple(_FAVORITES))
            thing = choose(_FAVORITES[favorite])
            return {"kind": favorite, "thing": thing, "Thing": thing.capitalize()}
        case "hobby":
            hobby = choose(words.HOBBIES)
            return {"hobby": hobby, "Hobby": hobby.capitalize()}
        case "pet":
            animal = choose(words.ANIMALS)
            return {"animal": animal, "a_animal": words.with_article(animal), "name": _any_name(random_source)}
        case "home":
            return {"place": words.invented_name(random_source)}
        case "age":
            return {"age": str(random_source.randint(4, 99))}
        case _:
            job = choose(words.JOBS)
            return {"job": job, "a_job": words.with_article(job)}


def _any_name(random_source: random.Random) -> str:
    if random_source.random() < _KNOWN_NAME_SHARE:
        return random_source.choice(words.NAMES)
    return words.invented_name(random_source)
