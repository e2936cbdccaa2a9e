"""Reads the phrase files of `phrases/`: word lists, questions with their answers, tables of facts, story sentences.

Knows nothing of what they are about. Their order matters: a seed chooses by place, so a corpus is a function of the
seed and of these files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).resolve().parent / "phrases"
_NO_WORDS = ("not_understood.txt", "first_lines.txt", "words.txt")
"""Files whose words are none, or not for the corpus, or read as lists."""


class Block(NamedTuple):
    """Things that users say which have the same answers."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]


def read_blocks(*names: str) -> tuple[Block, ...]:
    """Reads blocks of `> question` and `< answer` lines; other lines are remarks."""
    paragraphs = (lines for name in names for lines in _paragraphs(name))
    return tuple(block for lines in paragraphs if (block := _block(lines)).questions and block.answers)


def read_tables(name: str) -> list[tuple[Block, list[tuple[str, ...]]]]:
    """Reads `[title]` sections of one block of forms and rows of fields divided by semicolons."""
    tables = []
    for forms, *rows in read_sections(name).values():
        fields = [tuple(field.strip() for field in row.split(";")) for lines in rows for row in lines]
        tables.append((_block(forms), fields))
    return tables


def read_sections(name: str) -> dict[str, list[list[str]]]:
    """Reads `[title]` sections of blocks of lines; what stands before the first title is a remark."""
    sections: dict[str, list[list[str]]] = {}
    title = ""
    for paragraph in _paragraphs(name):
        if paragraph[0].startswith("["):
            title = paragraph[0].strip("[]")
            sections[title] = []
        if title:
            lines = [line for line in paragraph if not line.startswith("[")]
            sections[title] += [lines] if lines else []
    return sections


def words_of_phrases() -> list[str]:
    """The words of more than one letter that any phrase uses, in alphabetical order."""
    files = [path for path in sorted(_FOLDER.glob("*.txt")) if path.name not in _NO_WORDS]
    text = " ".join(path.read_text(encoding="utf-8") for path in files)
    without_slots = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", text)
    return sorted(set(re.findall(r"(?<![A-Za-z'])[a-z]{2,12}(?![A-Za-z'])", without_slots)))


def _block(lines: list[str]) -> Block:
    return Block(*(tuple(line[2:] for line in lines if line.startswith(mark)) for mark in ("> ", "< ")))


def _paragraphs(name: str) -> list[list[str]]:
    text = (_FOLDER / name).read_text(encoding="utf-8")
    return [paragraph.splitlines() for paragraph in re.split(r"\n\n+", text.strip())]
