"""Small talk: what has no right answer. Greetings, moods, questions about the assistant, whatever users tell, nonsense.

Knows nothing of other skills, of how users type and of rendering.
"""

from __future__ import annotations

import random

from infra.models.tiny.corpus.phrases import Block, read_blocks
from infra.models.tiny.corpus.wording import Exchange, Slots, exchange, normalised

ASSISTANT_NAME = "Fermata"

_SMALL_TALK = read_blocks("small_talk.txt", "openings.txt", "assistant.txt")
_GREETINGS = _SMALL_TALK[:5]
_OPEN_TALK = read_blocks("open_talk.txt", "life.txt", "work.txt")
_EVERYDAY = read_blocks("requests.txt", "questions.txt")
_NOT_UNDERSTOOD = read_blocks("not_understood.txt", "fragments.txt")
_UNKNOWN = read_blocks("unknown.txt", "explanations.txt")
UNKNOWN_ANSWERS = frozenset(answer for block in _UNKNOWN for answer in block.answers)
"""What is said where the answer is not known."""
_ABOUT_NAMES = [block for block in _SMALL_TALK if any("{assistant}" in answer for answer in block.answers)]
_STORY_OFFERS = [
    (question, answer)
    for questions, answers in (*_SMALL_TALK, *_OPEN_TALK)
    for question in questions
    for answer in answers
    if answer.endswith(("story about it?", "Shall I tell it?", "Shall I tell one?", "about one?"))
]


def greeting(random_source: random.Random, name: str = ASSISTANT_NAME) -> Exchange:
    """An exchange that conversations begin with."""
    return exchange(random_source, random_source.choice(_GREETINGS), Slots(random_source, {"assistant": name}))


def small_talk(random_source: random.Random, name: str = ASSISTANT_NAME) -> Exchange:
    """Talk about the two who talk; `name` is what the assistant is called."""
    return _one_of(random_source, _SMALL_TALK, name)


def open_talk(random_source: random.Random, name: str = ASSISTANT_NAME) -> Exchange:
    """What users tell of themselves and the world."""
    return _one_of(random_source, _OPEN_TALK, name)


def everyday(random_source: random.Random, name: str = ASSISTANT_NAME) -> Exchange:
    """Small requests and questions that one sentence answers."""
    return _one_of(random_source, _EVERYDAY, name)


def not_understood(random_source: random.Random, name: str = ASSISTANT_NAME) -> Exchange:
    """Nonsense, and a question back."""
    return _one_of(random_source, _NOT_UNDERSTOOD, name)


def unknown(random_source: random.Random, name: str = ASSISTANT_NAME) -> Exchange:
    """A question whose answer is not known here, and an answer that says so."""
    return _one_of(random_source, _UNKNOWN, name)


def own_name(random_source: random.Random, name: str) -> Exchange:
    """The assistant says its name, which a system turn may have given it."""
    return _one_of(random_source, _ABOUT_NAMES, name)


def story_offer(random_source: random.Random) -> tuple[Exchange, Slots]:
    """An exchange at whose end the assistant offers a story, and what was talked about."""
    question, answer = random_source.choice(_STORY_OFFERS)
    slots = Slots(random_source, {"assistant": ASSISTANT_NAME})
    question = slots.fill(question)
    return Exchange(question, slots.fill(answer), normalised(question)), slots


def _one_of(random_source: random.Random, blocks: tuple[Block, ...] | list[Block], name: str) -> Exchange:
    """An exchange of one of some blocks; those with many questions are drawn more often."""
    weights = [len(block.questions) ** 0.5 for block in blocks]
    block = random_source.choices(blocks, weights)[0]
    return exchange(random_source, block, Slots(random_source, {"assistant": name}))
