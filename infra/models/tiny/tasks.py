"""What the built-in model is examined in: conversations whose last answer can be judged, and how it is judged.

Every task is of the held-out part of the corpus (`conversations.is_held_out`). Knows no client and no model.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from infra.models.tiny.corpus import exercises, memory, stories, talk, world
from infra.models.tiny.corpus.conversations import Corpus, Message, typed
from infra.models.tiny.corpus.memory import Recall
from infra.models.tiny.corpus.wording import Exchange

Answer = Callable[[str], bool]
"""Whether a text is a right answer."""


@dataclass(frozen=True, slots=True)
class Task:
    """A conversation up to the answer that is asked for.

    Attributes:
        messages: the turns; the user has the last.
        expected: the answer, where there is one.
        is_right: judges an answer that came to its end.
    """

    messages: tuple[Message, ...]
    expected: str
    is_right: Answer


@dataclass(frozen=True, slots=True)
class Skill:
    """Tasks of one kind.

    Attributes:
        name: for the reader.
        count: how many are examined.
        bar: smallest share of right answers that the model is built for; 0 where none is promised.
        draw: makes a task.
    """

    name: str
    count: int
    bar: float
    draw: Callable[[Corpus], Task]


class TaskMaker:
    """Makes tasks; `count_tokens` tells how long a text is."""

    def __init__(self, seed: int, count_tokens: Callable[[str], int]) -> None:
        self._corpus = Corpus(seed, held_out=True)
        self._count_tokens = count_tokens

    def tasks(self, skill: Skill) -> list[Task]:
        """The tasks of a skill."""
        return [skill.draw(self._corpus) for _ in range(skill.count)]

    def skills(self) -> tuple[Skill, ...]:
        """Everything that is examined."""
        return (
            Skill("facts", 300, 0.99, exactly(world.fact)),
            Skill("facts, with a slip in every question", 60, 0, exactly(world.fact, slips=1.0)),
            Skill("count from one number to another", 100, 0.95, exactly(exercises.counting_up)),
            Skill("count down, in steps, neighbours", 60, 0, exactly(exercises.counting)),
            Skill("sums of single digits", 100, 0.95, exactly(exercises.digit_sum)),
            Skill("other sums, differences, products", 60, 0, exactly(exercises.small_sum)),
            Skill("repeat up to 12 words", 150, 0.95, exactly(exercises.repeating)),
            Skill("recall up to 12 words, 50 tokens later", 100, 0.95, self._recalled(50)),
            Skill("recall up to 12 words, 800 tokens later", 100, 0.9, self._recalled(800)),
            Skill("what the user said of themself, 200 tokens later", 60, 0, self._recalled(200, memory.about_user)),
            Skill("first word, last word, words backward", 60, 0, exactly(exercises.word_of_phrase)),
            Skill("spell", 60, 0, exactly(exercises.spelling)),
            Skill("stories use the animal and the object", 100, 0.95, _story),
            Skill("say that they do not know", 60, 0, _unknown),
        )

    def _recalled(
        self, distance: int, recall: Callable[[random.Random], Recall] = memory.words_to_remember
    ) -> Callable[[Corpus], Task]:
        """Something told, `distance` tokens of other talk or a little more, and the question for it.

        Words have to be named to the letter and alone; what users say of themselves may be named in any sentence.
        """

        def draw(corpus: Corpus) -> Task:
            told, asked = corpus.some(recall)
            while True:
                between: list[Message] = []
                while self._tokens(between) < distance:
                    between += typed(corpus.random_source, corpus.exchanges())
                if self._tokens(between) < distance * 1.2 + 20:
                    break
            messages = typed(corpus.random_source, [told, asked], slips=0.0)
            first, last = (next(messages), next(messages)), next(messages)
            alone = asked.quoted == asked.assistant
            is_right = _equals(asked.quoted) if alone else lambda text: asked.quoted in text
            return Task((*first, *between, last), asked.assistant, is_right)

        return draw

    def _tokens(self, messages: list[Message]) -> int:
        """Tokens of messages with what the template puts around each of them."""
        return sum(self._count_tokens(f"{message.role}\n{message.content}\n") + 2 for message in messages)


def first_line(line: str) -> Task:
    """A conversation that begins; nobody but a reader can judge the answer."""
    return Task((Message("user", line),), "", bool)


def exactly(draw: Callable[[random.Random], Exchange], slips: float = 0.0) -> Callable[[Corpus], Task]:
    """Tasks of one exchange whose answer is right to the letter or wrong."""

    def task(corpus: Corpus) -> Task:
        exchange = corpus.one(draw)
        return Task(_asked(corpus, exchange, slips), exchange.assistant, _equals(exchange.assistant))

    return task


def _story(corpus: Corpus) -> Task:
    """A story about an animal and an object."""
    request = corpus.one(stories.about_both)
    _, animal, thing = request.key.split()
    return Task(
        _asked(corpus, request), f"{animal}, {thing}", lambda text: animal in text.lower() and thing in text.lower()
    )


def _unknown(corpus: Corpus) -> Task:
    exchange = corpus.one(talk.unknown)
    return Task(_asked(corpus, exchange), "", lambda text: text in talk.UNKNOWN_ANSWERS)


def _asked(corpus: Corpus, exchange: Exchange, slips: float = 0.0) -> tuple[Message, ...]:
    question, _ = typed(corpus.random_source, [exchange], slips)
    return (question,)


def _equals(expected: str) -> Answer:
    return lambda text: text == expected
