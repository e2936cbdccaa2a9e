"""What users tell and ask for later: words to remember, and facts about themselves.

The answer stands in the conversation and nowhere else. Knows nothing of what is said in between.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple

from infra.models.tiny.corpus import exercises, words
from infra.models.tiny.corpus.phrases import read_blocks, read_sections
from infra.models.tiny.corpus.wording import QUOTED, Exchange, Slots, exchange, normalised, vary

_FORMS = {title: blocks[0] for title, blocks in read_sections("remember.txt").items()}
_KINDS = {
    "name": "name",
    "favorite": "thing",
    "hobby": "hobby",
    "pet": "name",
    "home": "place",
    "age": "age",
    "job": "job",
}
"""What users say about themselves, and the slot that is asked for."""
_BLOCKS = read_blocks("about_users.txt")
_ABOUT_USERS = {kind: (_BLOCKS[2 * index], _BLOCKS[2 * index + 1]) for index, kind in enumerate(_KINDS)}
_FAVORITES = ("color", "food", "fruit", "sport", "drink", "flower")
_KNOWN_NAME_SHARE = 0.6
"""The rest of the names is invented, so that they have to be copied."""


class Recall(NamedTuple):
    """What is told, and the exchange that asks for it later; what it has to name is quoted there."""

    told: Exchange
    asked: Exchange


def words_to_remember(random_source: random.Random, length: int = 0) -> Recall:
    """Words in no order; `length` of them, or up to twelve."""
    length = length or random_source.randint(1, exercises.LONGEST_PHRASE)
    said = exercises.phrase(random_source, length)
    kind = "password" if length <= 3 and random_source.random() < 0.5 else "words"
    told = vary(random_source, random_source.choice(_FORMS[f"told {kind}"])).replace("*", QUOTED)
    asked = vary(random_source, random_source.choice(_FORMS[f"asked {kind}"]))
    key = f"remember {said}"
    return Recall(Exchange(told, random_source.choice(_FORMS["noted"]), key, said), Exchange(asked, said, key, said))


def about_user(random_source: random.Random) -> Recall:
    """Something that a user says about themself."""
    kind = random_source.choice(tuple(_KINDS))
    values = Slots(random_source, _user_values(random_source, kind))
    told, asked = (exchange(random_source, block, values) for block in _ABOUT_USERS[kind])
    key = f"{told.key} {normalised(asked.user)}"
    return Recall(told._replace(key=key), asked._replace(key=key, quoted=values[_KINDS[kind]]))


def _user_values(random_source: random.Random, kind: str) -> Mapping[str, str]:
    """What the words of a kind do not decide."""
    match kind:
        case "name" | "pet":
            known = random_source.random() < _KNOWN_NAME_SHARE
            return {"name": random_source.choice(words.NAMES) if known else words.invented_name(random_source)}
        case "favorite":
            favorite = random_source.choice(_FAVORITES)
            return {"kind": favorite, "thing": words.of_kind(random_source, favorite)}
        case "home":
            return {"place": words.invented_name(random_source)}
        case "age":
            return {"age": str(random_source.randint(4, 99))}
        case _:
            return {}
