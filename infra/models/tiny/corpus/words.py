"""The words of the corpus, by kind, and a generator of invented ones.

Knows no sentences. The lists are long on purpose: a byte-level BPE that sees only a few words learns them whole and
leaves every other word to pieces that the model has never seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from infra.models.tiny.corpus.phrases import read_sections, words_of_phrases

_LISTS = {
    title: tuple(word for block in blocks for line in block for word in line.split())
    for title, blocks in read_sections("words.txt").items()
}
ANIMALS = _LISTS["animals"]
OBJECTS = _LISTS["objects"]
PLACES = _LISTS["places"]
HEROES = _LISTS["heroes"]
NAMES_SHE = _LISTS["names she"]
NAMES_HE = _LISTS["names he"]
NAMES = NAMES_SHE + NAMES_HE
COLORS = _LISTS["colors"]
FRUITS = _LISTS["fruits"]
VEGETABLES = _LISTS["vegetables"]
FOODS = _LISTS["foods"]
DRINKS = _LISTS["drinks"]
INSTRUMENTS = _LISTS["instruments"]
JOBS = _LISTS["jobs"]
HOBBIES = _LISTS["hobbies"]
SHAPES = _LISTS["shapes"]
SPORTS = _LISTS["sports"]
CLOTHES = _LISTS["clothes"]
FLOWERS = _LISTS["flowers"]
TREES = _LISTS["trees"]
ADJECTIVES = _LISTS["adjectives"]
VERBS = _LISTS["verbs"]
NOUNS = _LISTS["nouns"]
FUNCTION_WORDS = _LISTS["function words"]
REAL_PLACES = _LISTS["real places"]
NUMBER_WORDS = _LISTS["number words"]
"""zero to twenty, each at its place."""

_PARTS_OF_WORDS = ("onsets", "nuclei", "codas", "endings")
_NOT_TOLD = (*_PARTS_OF_WORDS, "number words", "real places")
LISTED_WORDS = tuple(
    dict.fromkeys(word.lower() for title, group in _LISTS.items() if title not in _NOT_TOLD for word in group)
)
"""Every word that is spelled."""
ALL_WORDS = tuple(dict.fromkeys((*LISTED_WORDS, *words_of_phrases())))
"""Every word that is repeated and remembered: those of the lists and those that the phrases use."""

CATEGORIES = {
    "animals": ANIMALS,
    "colors": COLORS,
    "colours": COLORS,
    "fruits": FRUITS,
    "vegetables": VEGETABLES,
    "foods": FOODS,
    "drinks": DRINKS,
    "instruments": INSTRUMENTS,
    "jobs": JOBS,
    "hobbies": HOBBIES,
    "shapes": SHAPES,
    "sports": SPORTS,
    "clothes": CLOTHES,
    "flowers": FLOWERS,
    "trees": TREES,
    "names": NAMES,
    "places": PLACES,
}
"""What lists are asked for."""

SINGULARS = {kind: kind.removesuffix("s") for kind in CATEGORIES} | {"hobbies": "hobby", "clothes": "piece of clothing"}

_ONSETS, _NUCLEI, _CODAS, _ENDINGS = (_LISTS[title] for title in _PARTS_OF_WORDS)
# Many syllables and words end without any.
_CODAS = ("", "", "", *_CODAS)
_ENDINGS = ("", "", "", *_ENDINGS)


def invented_word(random_source: random.Random) -> str:
    """A pronounceable word of one to three syllables that most likely does not exist."""
    syllables = random_source.choice((1, 1, 2, 2, 2, 3))
    word = "".join(
        random_source.choice(_ONSETS) + random_source.choice(_NUCLEI) + random_source.choice(_CODAS)
        for _ in range(syllables)
    )
    return word + random_source.choice(_ENDINGS)


def invented_name(random_source: random.Random) -> str:
    """An invented word as a name of a person or a place."""
    return invented_word(random_source).capitalize()


def any_word(random_source: random.Random) -> str:
    """A known word most of the time, else an invented one."""
    if random_source.random() < 0.88:
        return random_source.choice(ALL_WORDS)
    return invented_word(random_source)


def of_kind(random_source: random.Random, kind: str) -> str:
    """A value of a slot of this name.

    Raises:
        KeyError: there is no such kind.
    """
    if kind in _SLOT_LISTS:
        return random_source.choice(_SLOT_LISTS[kind])
    return _SLOT_MAKERS[kind](random_source)


def with_article(noun: str) -> str:
    """`a fox`, `an otter`."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


_SLOT_LISTS = {
    **{singular: CATEGORIES[kind] for kind, singular in SINGULARS.items()},
    "clothes": CLOTHES,
    "object": OBJECTS,
    "adjective": ADJECTIVES,
    "verb": VERBS,
    "noun": NOUNS,
    "country": REAL_PLACES,
}
_SLOT_MAKERS: dict[str, Callable[[random.Random], str]] = {
    "word": any_word,
    "invented": invented_word,
    "town": invented_name,
    "person": lambda random_source: f"{random_source.choice(NAMES)} {invented_name(random_source)}",
    "number": lambda random_source: str(random_source.randint(1, 99)),
    "year": lambda random_source: str(random_source.randint(1000, 2030)),
}
