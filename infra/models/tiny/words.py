"""The words of the corpus, by kind, and a generator of invented ones.

Knows no sentences. The lists are long on purpose: a byte-level BPE that sees only a few words learns them whole and
leaves every other word to pieces that the model has never seen.
"""

from __future__ import annotations

import random

from infra.models.tiny.phrases import read_sections

_LISTS = {
    title: tuple(word for block in blocks for line in block for word in line.split())
    for title, blocks in read_sections("words.txt").items()
}
ANIMALS = _LISTS["animals"]
OBJECTS = _LISTS["objects"]
PLACES = _LISTS["places"]
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
ALL_WORDS = tuple(
    dict.fromkeys(word.lower() for title, group in _LISTS.items() if title not in _NOT_TOLD for word in group)
)
"""Every word that repeating, spelling and stories draw from."""

CATEGORIES = {
    "animals": ANIMALS,
    "colors": COLORS,
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

_ONSETS, _NUCLEI, _CODAS, _ENDINGS = (_LISTS[title] for title in _PARTS_OF_WORDS)
# Many syllables and words end without any.
_CODAS = ("", "", "", *_CODAS)
_ENDINGS = ("", "", "", *_ENDINGS)


def invented_word(random_source: random.Random) -> str:
    """A pronounceable word of one to three syllables that most likely does not exist."""
    syllables = random_source.choice((1, 2, 2, 3))
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
    if random_source.random() < 0.7:
        return random_source.choice(ALL_WORDS)
    return invented_word(random_source)


def with_article(noun: str) -> str:
    """`a fox`, `an otter`."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
