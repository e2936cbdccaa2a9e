"""The corpus of the built-in model: what is said in it, what is held out, and that its answers are right."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import islice

import pytest

from infra.models.tiny.corpus import __main__ as corpus_command
from infra.models.tiny.corpus import conversations, exercises, memory, stories, talk, words, world
from infra.models.tiny.corpus.conversations import Conversation, Corpus, is_held_out
from infra.models.tiny.corpus.voice import Voice
from infra.models.tiny.corpus.wording import QUOTED, Exchange, Slots, normalised, vary


@pytest.fixture
def source() -> random.Random:
    return random.Random(1)


def _said(conversation: Conversation, role: str) -> list[str]:
    return [message.content for message in conversation.messages if message.role == role]


# --- streams and parts


def test_a_seed_is_a_stream() -> None:
    first, again, other = (list(islice(conversations.training(seed), 300)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    "skill", [exercises.digit_sum, exercises.counting_up, exercises.repeating, world.fact, stories.about_both]
)
def test_tasks_are_held_out_whatever_the_seed(skill: object) -> None:
    """The held-out part of one seed and the training part of another have no task in common."""
    assert callable(skill)
    part, rest = Corpus(1, held_out=False), Corpus(2, held_out=True)
    trained = {part.one(skill).key for _ in range(3000)}
    held_out = {rest.one(skill).key for _ in range(100)}
    assert not trained & held_out
    assert len(held_out) > 5


def test_a_task_is_held_out_however_it_is_typed(source: random.Random) -> None:
    """What users type has the key of the well written question, except for slips and short forms."""
    assert is_held_out("what is 8 plus 4") == is_held_out(normalised("What is 8 plus 4?"))
    trained = {normalised(text) for item in islice(conversations.training(3), 4000) for text in _said(item, "user")}
    held_out = {item.key for item in (Corpus(5, held_out=True).one(exercises.digit_sum) for _ in range(200))}
    assert not trained & held_out


def test_the_first_lines_are_never_trained_on() -> None:
    lines = {normalised(line) for line in conversations.FIRST_LINES}
    assert len(set(conversations.FIRST_LINES)) == 40
    said = Counter(
        normalised(text) for item in islice(conversations.training(4), 20000) for text in _said(item, "user")
    )
    assert sum(said.values()) > 15000
    assert not lines & said.keys()


def test_practice_is_about_the_words_of_the_user() -> None:
    for conversation in islice(conversations.training(8, practice=1.0), 200):
        users, answers = _said(conversation, "user"), _said(conversation, "assistant")
        assert 2 <= len(users) <= 10
        assert sum(answer.split()[0] in " ".join(users) for answer in answers) >= len(answers) / 3


def test_everything_is_talked_about() -> None:
    said = "\n".join(message.content for item in islice(conversations.training(4), 4000) for message in item.messages)
    for expected in (
        "story about",
        "Count to",
        "capital of",
        "I don't know",
        "Repeat",
        "Spell",
        "emember",
        "Nice to meet",
    ):
        assert expected in said
    assert not re.search(r"[{}|\0]", said.replace("|", "", said.count(":|")))


def test_conversations_end_with_an_answer() -> None:
    for conversation in islice(conversations.training(6), 500):
        roles = [message.role for message in conversation.messages]
        assert all(message.content for message in conversation.messages)
        if roles == ["text"]:
            continue
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)


# --- answers


def test_counting_is_right(source: random.Random) -> None:
    for _ in range(300):
        exchange = exercises.counting_up(source)
        numbers = [int(number) for number in re.findall(r"\d+", exchange.assistant)]
        first, last = (int(number) for number in exchange.key.split()[1:])
        assert numbers == list(range(first, last + 1))


def test_sums_are_right(source: random.Random) -> None:
    for _ in range(500):
        first, name, second, result = re.fullmatch(
            r"(\d+) (plus|minus|times) (\d+) is (\d+)\.", exercises.small_sum(source).assistant
        ).groups()  # type: ignore[union-attr]
        one, other = int(first), int(second)
        assert int(result) == {"plus": one + other, "minus": one - other, "times": one * other}[name]


def test_what_is_repeated_was_said(source: random.Random) -> None:
    for _ in range(300):
        exchange = exercises.repeating(source)
        assert QUOTED in exchange.user
        assert set(exchange.assistant.split()) == set(exchange.quoted.split())
        assert 1 <= len(exchange.quoted.split()) <= exercises.LONGEST_PHRASE


def test_what_is_remembered_was_told(source: random.Random) -> None:
    for _ in range(300):
        told, asked = memory.words_to_remember(source)
        assert asked.assistant == told.quoted
        told, asked = memory.about_user(source)
        answer = {word.lower() for word in re.findall(r"[\w-]+", asked.assistant)}
        assert answer & {word.lower() for word in re.findall(r"[\w-]+", told.user)}


def test_words_are_spelled_right(source: random.Random) -> None:
    for _ in range(300):
        exchange = exercises.spelling(source)
        if "-" in exchange.assistant:
            assert exchange.assistant.replace("-", "").rstrip(".").lower() in exchange.user.lower()


def test_stories_have_what_was_asked_for(source: random.Random) -> None:
    for _ in range(300):
        exchange = stories.about_both(source)
        _, animal, thing = exchange.key.split()
        assert animal in exchange.assistant
        assert thing in exchange.assistant
        assert animal in exchange.user.lower()
    for length, (least, most) in {"short": (30, 110), "long": (70, 220)}.items():
        told = stories.tell(source, stories.StoryRequest("fox", "lantern", length=length))
        assert least < len(told.split()) < most


def test_a_question_of_fact_has_one_answer(source: random.Random) -> None:
    answers: dict[str, set[str]] = {}
    for _ in range(20000):
        exchange = world.fact(source)
        answers.setdefault(exchange.key, set()).add(exchange.assistant)
    assert len(answers) > 3000
    assert {key: found for key, found in answers.items() if len(found) > 1} == {}


def test_talk_and_facts_do_not_contradict_each_other(source: random.Random) -> None:
    """A question about the world is not answered with small talk or with not knowing."""
    facts = {world.fact(source).key for _ in range(20000)}
    others = {skill(source).key for skill in (talk.small_talk, talk.open_talk, talk.unknown) for _ in range(8000)}
    assert len(others) > 10000
    assert sorted(facts & others) == []


# --- wordings


def test_alternatives_and_slots() -> None:
    drawn = {vary(random.Random(seed), "(good |)day (to you|)!") for seed in range(50)}
    assert drawn == {"good day to you!", "day to you!", "good day!", "day!"}
    slots = Slots(random.Random(1), {"animal": "owl"})
    assert slots.fill("{a_animal}, {Animal}, {A_animal}") == "an owl, Owl, An owl"
    assert slots["animal2"] != "owl"
    assert slots["animal2"] in words.ANIMALS
    assert slots.fill("{food}") == slots.fill("{food}")
    with pytest.raises(KeyError):
        slots.fill("{nothing of the kind}")


def test_what_is_quoted_is_typed_as_it_is() -> None:
    exchange = Exchange(f"Please, repeat what I'm saying: {QUOTED}", "", "", "Fox, isn't It?")
    typed = {Voice(random.Random(seed)).say(exchange) for seed in range(200)}
    assert len(typed) > 5
    assert all("Fox, isn't It?" in text for text in typed)


def test_many_users_type_in_lower_case_and_without_marks() -> None:
    typed = [Voice(random.Random(seed)).type_out("What is your name?") for seed in range(400)]
    assert 0.3 < sum(text == text.lower() for text in typed) / 400 < 0.8
    assert 0.3 < sum(text[-1].isalpha() for text in typed) / 400 < 0.8
    assert Voice(random.Random(1)).type_out("???")


def test_conversations_are_printed_as_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    corpus_command.main(["--count", "20", "--held-out"])
    printed = [json.loads(line)["messages"] for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 20
    assert all(messages[-1]["role"] == "assistant" for messages in printed)
