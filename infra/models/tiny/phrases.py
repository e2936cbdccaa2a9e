"""Reads the phrase files of `phrases/`: word lists, exchanges and story sentences.

Their order matters: a seed chooses by place, so a corpus is a function of the seed and of these files.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).resolve().parent / "phrases"


class Exchange(NamedTuple):
    """Things that users say which have the same answers."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]


def read_exchanges(name: str) -> tuple[Exchange, ...]:
    """Reads blocks of `> question` and `< answer` lines; other lines are remarks."""
    exchanges = []
    for block in _blocks(name):
        questions = tuple(line[2:] for line in block if line.startswith("> "))
        answers = tuple(line[2:] for line in block if line.startswith("< "))
        if questions and answers:
            exchanges.append(Exchange(questions, answers))
    return tuple(exchanges)


def read_sections(name: str) -> dict[str, list[list[str]]]:
    """Reads `[title]` sections of blocks of lines; what stands before the first title is a remark."""
    sections: dict[str, list[list[str]]] = {}
    title = ""
    for block in _blocks(name):
        if block[0].startswith("["):
            title = block[0].strip("[]")
            sections[title] = []
        if title:
            lines = [line for line in block if not line.startswith("[")]
            sections[title] += [lines] if lines else []
    return sections


def _blocks(name: str) -> list[list[str]]:
    text = (_FOLDER / name).read_text(encoding="utf-8")
    return [block.splitlines() for block in text.strip().split("\n\n")]
