"""The endless stream of conversations that the built-in model is trained on.

Deterministic: a seed gives one stream. Conversations are dealt into two parts by a hash of their text, so what is held
out never occurs in training, whatever the seeds are. Knows no token and no template (`tokenizer.py` has both).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from infra.models.tiny import exercises, stories, talk, words, world
from infra.models.tiny.talk import Turns

HELD_OUT_SHARE = 64
"""One conversation in this many is held out."""

_SYSTEM_LINES = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a helpful, honest and short assistant.",
    "Be kind.",
    "You tell stories to children.",
    "Answer in short sentences.",
    "You are a small language model that likes to chat.",
)
_STORY_REQUESTS = (
    "Tell me a {length}story about {a_animal} and {a_object}.",
    "Write a {length}story about {a_animal} and {a_object}.",
    "Can you tell me a {length}story about {a_animal} who has {a_object}?",
    "I would like a {length}story with {a_animal} and {a_object}, please.",
    "Please write me a {length}tale about {a_animal} and {a_object}.",
    "A {length}story about {a_animal} and {a_object}!",
    "Make up a {length}story. It should have {a_animal} and {a_object} in it.",
)
_OPEN_STORY_REQUESTS = (
    "Tell me a {length}story.",
    "Tell me a {length}story about {a_animal}.",
    "Write a {length}story about {a_animal} named {name}.",
    "Do you know a {length}story?",
    "Another {length}story, please.",
    "I want to hear a {length}story about {a_object}.",
    "Can you tell me a {length}bedtime story?",
    "Write a {length}story about {name} the {animal}.",
)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A list of messages, or, with one message of the role `text`, plain text without turns."""

    messages: tuple[Message, ...]

    @property
    def held_out(self) -> bool:
        """Whether the conversation belongs to the held-out part; a property of its text alone."""
        text = "\0".join(part for message in self.messages for part in (message.role, message.content))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


def training(seed: int) -> Iterator[Conversation]:
    """Conversations to learn from, without end."""
    return (conversation for conversation in _all(seed) if not conversation.held_out)


def held_out(seed: int) -> Iterator[Conversation]:
    """Conversations to measure with, without end; none of them is ever in `training`."""
    return (conversation for conversation in _all(seed) if conversation.held_out)


def copy_rows(seed: int, vocabulary_size: int, separator: int, length: int) -> Iterator[tuple[list[int], list[bool]]]:
    """Rows of the copy curriculum: random ids, the separator, the same ids again, and so on until the row is full.

    Small models learn everything else first and copying hardly ever; with such rows alone they learn it in minutes, by
    forming induction heads (Olsson et al. 2022).

    Args:
        seed: of the rows.
        vocabulary_size: ids are drawn below this, except the separator.
        separator: id between a problem and its copy, and after the copy.
        length: ids of a row.

    Yields:
        The ids and, for each, whether it is part of a copy, which is what the loss counts.
    """
    random_source = random.Random(f"copies {seed}")
    while True:
        token_ids: list[int] = []
        counted: list[bool] = []
        while len(token_ids) < length:
            problem = [
                random_source.randrange(separator + 1, vocabulary_size) for _ in range(random_source.randint(2, 12))
            ]
            token_ids += [*problem, separator, *problem, separator]
            counted += [False] * (len(problem) + 1) + [True] * (len(problem) + 1)
        yield token_ids[:length], counted[:length]


def _all(seed: int) -> Iterator[Conversation]:
    random_source = random.Random(f"conversations {seed}")
    while True:
        yield _plain_text(random_source) if random_source.random() < 0.04 else _conversation(random_source)


def _plain_text(random_source: random.Random) -> Conversation:
    """A story without anybody who asks for it."""
    length = random_source.choice(("short", "middle", "long"))
    request = stories.StoryRequest(
        stories.choose_animal(random_source), stories.choose_object(random_source), length=length
    )
    return Conversation((Message("text", stories.tell(random_source, request)),))


def _conversation(random_source: random.Random) -> Conversation:
    """Chains one to ten exchanges; what the user said about themself is asked for after some of them."""
    name = talk.ASSISTANT_NAME
    messages: list[Message] = []
    if random_source.random() < 0.25:
        line = random_source.choice(_SYSTEM_LINES)
        if random_source.random() < 0.4:
            name = (
                random_source.choice(words.NAMES)
                if random_source.random() < 0.5
                else words.invented_name(random_source)
            )
            line = random_source.choice(
                ("You are {0}.", "Your name is {0}.", "You are {0}, a friendly assistant.")
            ).format(name)
        messages.append(Message("system", line))
    turns: Turns = []
    if random_source.random() < 0.2:
        turns += talk.greeting(random_source)
    if name != talk.ASSISTANT_NAME and random_source.random() < 0.7:
        turns += talk.own_name(random_source, name)
    count = random_source.choice((1, 1, 1, 2, 2, 2, 3, 4, 6, 9))
    between = [_exchange(random_source, name) for _ in range(count)]
    if random_source.random() < 0.25:
        statement, question = talk.about_user(random_source)
        between = [statement, *between[: random_source.randint(0, 3)], question]
    turns += [turn for exchange in between for turn in exchange]
    for user, assistant in turns:
        messages += [Message("user", _noisy(random_source, user)), Message("assistant", assistant)]
    return Conversation(tuple(messages))


def _exchange(random_source: random.Random, name: str) -> Turns:
    """One exchange of a skill drawn by its weight."""
    skills: dict[Callable[[], Turns], int] = {
        lambda: talk.small_talk(random_source, name): 22,
        lambda: [_fact(random_source)]: 20,
        lambda: world.town_follow_up(random_source): 4,
        lambda: [world.unknown_question(random_source)]: 8,
        lambda: [_story(random_source)]: 14,
        lambda: [*talk.story_offer(random_source), _accepted_story(random_source)]: 1,
        lambda: exercises.counting(random_source): 4,
        lambda: exercises.small_sum(random_source): 6,
        lambda: exercises.repeating(random_source): 12,
        lambda: exercises.spelling(random_source): 4,
        lambda: exercises.listing(random_source): 5,
    }
    return random_source.choices(list(skills), weights=list(skills.values()))[0]()


_FACTS = world.known_facts()


def _fact(random_source: random.Random) -> tuple[str, str]:
    questions, answer = random_source.choice(_FACTS)
    return random_source.choice(questions), answer


def _story(random_source: random.Random) -> tuple[str, str]:
    length = random_source.choice(("short", "middle", "middle", "long"))
    animal, thing = stories.choose_animal(random_source), stories.choose_object(random_source)
    form = random_source.choice(_STORY_REQUESTS if random_source.random() < 0.7 else _OPEN_STORY_REQUESTS)
    name = random_source.choice(words.NAMES) if "{name}" in form else ""
    question = form.format(
        length="" if length == "middle" else f"{length} ",
        animal=animal,
        a_animal=words.with_article(animal),
        a_object=words.with_article(thing),
        name=name,
    )
    return question, stories.tell(random_source, stories.StoryRequest(animal, thing, name, length))


def _accepted_story(random_source: random.Random) -> tuple[str, str]:
    """A story that the assistant had offered."""
    accepted = random_source.choice(("Yes, please!", "Yes.", "Sure.", "Okay.", "Why not.", "Gladly!", "Please do."))
    return accepted, _story(random_source)[1]


def _noisy(random_source: random.Random, text: str) -> str:
    """What users type: often in lower case, without the last mark, with polite words around."""
    draw = random_source.random()
    if draw < 0.1:
        polite = random_source.choice(("Please ", "Hey, ", "So, ", "Well, ", "Now ", "Hello! ", "Okay, "))
        text = polite + (text if polite.endswith("! ") or text.startswith("I") else text[0].lower() + text[1:])
    elif draw < 0.14 and text[-1] in ".!?":  # else the end is something to be repeated
        text = f"{text} {random_source.choice(('Thanks!', 'Please.', 'Thank you.'))}"
    if random_source.random() < 0.35:
        text = text.lower()
    if random_source.random() < 0.4:
        text = text.rstrip(".!?")
    if random_source.random() < 0.1:
        text = text.replace("'", "").replace(",", "")
    return text
