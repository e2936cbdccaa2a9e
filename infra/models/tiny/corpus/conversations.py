"""The endless stream of conversations that the built-in model is trained on.

Deterministic: a seed gives one stream. Every exchange has a task (`Exchange.key`), and tasks are dealt into two parts
by a hash, so what is held out never occurs in training, whatever the seeds are and however it is typed. Knows no token
and no template (`tokenizer.py` has both).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from infra.models.tiny.corpus import exercises, memory, stories, talk, words, world
from infra.models.tiny.corpus.memory import Recall
from infra.models.tiny.corpus.phrases import read_sections
from infra.models.tiny.corpus.voice import Voice
from infra.models.tiny.corpus.wording import Exchange, normalised

Skill = Callable[[random.Random, str], Sequence[Exchange]]
"""Draws exchanges that belong together, with an assistant of a name."""

HELD_OUT_SHARE = 24
"""One task in this many is held out."""

_SYSTEM_LINES = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a helpful, honest and short assistant.",
    "Be kind.",
    "You tell stories to children.",
    "Answer in short sentences.",
    "You are a small language model that likes to chat.",
)
_NAMING_LINES = ("You are {}.", "Your name is {}.", "You are {}, a friendly assistant.")
FIRST_LINES = tuple(read_sections("first_lines.txt")["first lines"][0])
"""What users may say first. It is never trained on: the model card has the answers."""

_FIRST_LINES = frozenset(map(normalised, FIRST_LINES))


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A list of messages, or, with one message of the role `text`, plain text without turns."""

    messages: tuple[Message, ...]


def is_held_out(task: str) -> bool:
    """Whether a task belongs to the held-out part; a property of the task alone."""
    return int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


def training(seed: int, practice: float = 0.0) -> Iterator[Conversation]:
    """Conversations to learn from, without end; `practice` is the share of `Corpus.practice` among them.

    Judged by what was typed, since a slip may make a first line of another text.
    """
    corpus = Corpus(seed, held_out=False)
    for conversation in corpus.conversations():
        chosen = corpus.practice() if corpus.random_source.random() < practice else conversation
        said = (normalised(message.content) for message in chosen.messages if message.role == "user")
        if _FIRST_LINES.isdisjoint(said):
            yield chosen


def held_out(seed: int) -> Iterator[Conversation]:
    """Conversations to measure with, without end; no task in them is ever in `training`."""
    return Corpus(seed, held_out=True).conversations()


class Corpus:
    """One part of the corpus.

    Attributes:
        random_source: everything is drawn from it.
    """

    def __init__(self, seed: int, held_out: bool) -> None:
        self.random_source = random.Random(f"conversations {seed} {held_out}")
        self._held_out = held_out

    def conversations(self) -> Iterator[Conversation]:
        """Conversations and, now and then, a story that nobody asked for."""
        while True:
            if self.random_source.random() < 0.02:
                story = self.one(stories.asked_for)
                yield Conversation((Message("text", story.assistant),))
            else:
                yield self._conversation()

    def practice(self) -> Conversation:
        """A conversation in which the user has all sorts of words repeated and remembered.

        Small models learn everything else first and copying hardly ever. With many of these they learn it early.
        """
        exchanges: list[Exchange] = []
        for _ in range(self.random_source.randint(2, 5)):
            repeats = self.random_source.random() < 0.7
            exchanges += [self.one(exercises.repeating)] if repeats else self.some(memory.words_to_remember)
        return Conversation(tuple(typed(self.random_source, exchanges)))

    def one(self, draw: Callable[[random.Random], Exchange]) -> Exchange:
        """Draws an exchange whose task belongs to this part."""
        return self.some(lambda source: (draw(source),))[0]

    def some(self, draw: Callable[[random.Random], Sequence[Exchange]]) -> Sequence[Exchange]:
        """Draws exchanges that belong together until all their tasks belong to this part."""
        while True:
            drawn = draw(self.random_source)
            if all(self._belongs(exchange) for exchange in drawn):
                return drawn

    def remembered(self, draw: Callable[[random.Random], Recall], words_between: int, name: str) -> list[Exchange]:
        """Something told, other talk of about as many words, and the question for what was told."""
        told, asked = self.some(draw)
        exchanges = [told]
        while words_between > 0:
            between = self.exchanges(name)
            exchanges += between
            words_between -= sum(len(f"{item.user} {item.quoted} {item.assistant}".split()) for item in between)
        return [*exchanges, asked]

    def exchanges(self, name: str = talk.ASSISTANT_NAME) -> Sequence[Exchange]:
        """One exchange, or two that belong together, of a skill drawn by its weight."""
        skill = self.random_source.choices(tuple(_SKILLS), tuple(_SKILLS.values()))[0]
        return self.some(lambda source: skill(source, name))

    def _belongs(self, exchange: Exchange) -> bool:
        return is_held_out(exchange.key) == self._held_out

    def _conversation(self) -> Conversation:
        """Chains one to six exchanges, or has something told first and asked for last."""
        source = self.random_source
        system, name = "", talk.ASSISTANT_NAME
        if source.random() < 0.2:
            system, name = _system_turn(source)
        exchanges: list[Exchange] = []
        if source.random() < 0.15:
            exchanges.append(self.one(lambda source: talk.greeting(source, name)))
        if name != talk.ASSISTANT_NAME and source.random() < 0.7:
            exchanges.append(self.one(lambda source: talk.own_name(source, name)))
        if source.random() < _REMEMBERED_SHARE:
            recall = source.choice((memory.words_to_remember, memory.words_to_remember, memory.about_user))
            exchanges += self.remembered(recall, int(source.uniform(-0.3, 1) * source.choice(_DISTANCES)), name)
        else:
            for _ in range(source.choice((1, 1, 1, 2, 2, 2, 3, 4, 6))):
                exchanges += self.exchanges(name)
        messages = [Message("system", system)] if system else []
        return Conversation((*messages, *typed(source, exchanges)))


def typed(random_source: random.Random, exchanges: Iterable[Exchange], slips: float | None = None) -> Iterator[Message]:
    """The turns of exchanges as one user types them; `slips`: see `Voice`."""
    voice = Voice(random_source, slips)
    for exchange in exchanges:
        yield Message("user", voice.say(exchange))
        yield Message("assistant", exchange.assistant)


def _system_turn(random_source: random.Random) -> tuple[str, str]:
    """A system turn and the name that the assistant has then."""
    if random_source.random() < 0.6:
        return random_source.choice(_SYSTEM_LINES), talk.ASSISTANT_NAME
    known = random_source.random() < 0.5
    name = random_source.choice(words.NAMES) if known else words.invented_name(random_source)
    return random_source.choice(_NAMING_LINES).format(name), name


def _alone(skill: Callable[[random.Random], Exchange]) -> Skill:
    """A skill of one exchange in which the assistant has no name."""
    return lambda random_source, name: (skill(random_source),)


def _named(skill: Callable[[random.Random, str], Exchange]) -> Skill:
    return lambda random_source, name: (skill(random_source, name),)


def _story_offered(random_source: random.Random, name: str) -> Sequence[Exchange]:
    offer, slots = talk.story_offer(random_source)
    return offer, stories.accepted(random_source, slots)


def _town_follow_up(random_source: random.Random, name: str) -> Sequence[Exchange]:
    return world.town_follow_up(random_source)


_SKILLS: dict[Skill, float] = {
    _named(talk.small_talk): 20,
    _named(talk.open_talk): 17,
    _named(talk.everyday): 14,
    _named(talk.not_understood): 7,
    _named(talk.unknown): 8,
    _alone(world.fact): 30,
    _town_follow_up: 2,
    _alone(stories.asked_for): 6,
    _story_offered: 1,
    _alone(exercises.counting): 9,
    _alone(exercises.small_sum): 5,
    _alone(exercises.repeating): 12,
    _alone(exercises.word_of_phrase): 5,
    _alone(exercises.spelling): 8,
    _alone(exercises.listing): 4,
}
"""What is talked about, and how often."""
_REMEMBERED_SHARE = 0.2
_DISTANCES = (10, 30, 80, 200, 400, 800)
"""Words between what is told and the question for it, at most."""
