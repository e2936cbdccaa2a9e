"""The examination of the built-in model: what is asked, how it is judged, and the page that says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra.models.tiny import card, tasks, train
from infra.models.tiny.corpus import exercises, memory
from infra.models.tiny.corpus.conversations import Corpus
from infra.models.tiny.tasks import TaskMaker

MAKER = TaskMaker(1, lambda text: len(text.split()))  # words do for tokens here


def _skill(name: str) -> tasks.Skill:
    return next(skill for skill in MAKER.skills() if name in skill.name)


def test_the_bars_are_those_that_the_model_was_built_for() -> None:
    bars = {skill.name: skill.bar for skill in MAKER.skills() if skill.bar}
    assert bars == {
        "facts": 0.99,
        "count from one number to another": 0.95,
        "sums of single digits": 0.95,
        "repeat up to 12 words": 0.95,
        "recall up to 12 words, 50 tokens later": 0.95,
        "recall up to 12 words, 800 tokens later": 0.9,
        "stories use the animal and the object": 0.95,
    }


def test_tasks_come_with_their_answers() -> None:
    corpus = Corpus(1, held_out=True)
    for skill in MAKER.skills():
        task = skill.draw(corpus)
        assert task.messages[-1].role == "user"
        right = task.expected.replace(", ", " and a ") if "stories" in skill.name else task.expected
        if right:
            assert task.is_right(right)
        assert not task.is_right("something else")


def test_the_tasks_of_a_seed_are_the_same() -> None:
    first, again = (TaskMaker(3, len).tasks(_skill("facts")) for _ in range(2))
    assert [task.messages for task in first] == [task.messages for task in again]
    assert len({task.messages[0].content for task in first}) > 100


@pytest.mark.parametrize(("name", "distance"), [("50 tokens", 50), ("800 tokens", 800)])
def test_what_is_recalled_lies_as_far_back_as_is_said(name: str, distance: int) -> None:
    corpus = Corpus(2, held_out=True)
    for _ in range(5):
        messages = _skill(name).draw(corpus).messages
        between = messages[2:-1]
        assert messages[0].role == "user"
        assert distance <= sum(len(message.content.split()) + 3 for message in between) < 1.2 * distance + 25


def test_phrases_to_recall_have_up_to_twelve_words() -> None:
    corpus = Corpus(3, held_out=True)
    lengths = {len(corpus.some(memory.words_to_remember)[0].quoted.split()) for _ in range(200)}
    assert lengths == set(range(1, exercises.LONGEST_PHRASE + 1))


def test_the_card_says_what_was_found(tmp_path: Path) -> None:
    train.main(["--work", str(tmp_path / "work"), "--output", str(tmp_path), "--quick"])
    found: dict[str, Any] = {
        "skills": {
            "facts": {"count": 200, "bar": 0.99, "right": 0.995, "ended": 1.0, "wrong": []},
            "stories use the animal and the object": {
                "count": 50,
                "bar": 0.9,
                "right": 0.98,
                "ended": 0.96,
                "wrong": [],
            },
        },
        "temperatures": {"0.8": 0.9, "1.5": 0.2},
        "first_lines": [["hi | there", "Hello!\nHow are *you*?"]],
    }
    card.write_card(tmp_path, found)
    written = (tmp_path / "README.md").read_text()
    assert "| facts | 200 | 99.5% | 99% |" in written
    assert "| stories end by themselves | 50 | 96.0% | 90% |" in written
    assert r"| hi \| there | Hello!<br>How are \*you\*? |" in written
    assert "90% are" in written
    assert "$" not in written
    again = json.loads(json.dumps(found))
    again["skills"]["facts"]["right"] = 0.97
    again["training"] = {
        "seed": 2,
        "training_tokens": 3e6,
        "training_seconds": 600,
        "hardware": "one abacus",
        "held_out_perplexity": 1.5,
    }
    (tmp_path / "trained_again.json").write_text(json.dumps(again))
    card.write_card(tmp_path, found)
    written = (tmp_path / "README.md").read_text()
    assert "| facts | 200 | 99.5% | 99% | 97.0% |" in written
    assert "from seed 2: 3.0 million tokens in 10 minutes on one abacus, held-out perplexity 1.5." in written
