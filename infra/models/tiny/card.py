"""Examines a model through a running system and writes its card.

    python -m infra.models.tiny.card                      # `make card`
    python -m infra.models.tiny.card --model /tmp/tiny/model

Starts a system of its own on the model. Writes `examination.json` and `README.md` into the model's folder; with
`trained_again.json` there, which is the `examination.json` of another run, the card compares the two.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any

from fermata import AsyncClient
from infra.models.tiny import examine, recipe, tasks, tokenizer
from infra.models.tiny.corpus import conversations, world
from infra.models.tiny.examine import Answered

_TEMPLATE = Path(__file__).resolve().with_name("card_template.md")
_SEED = 20
_SAMPLED_FACTS, _SAMPLING_SEEDS = 60, (1, 2, 3, 4, 5)
_COOL, _HOT = 0.8, 1.5
"""Temperatures at which facts are sampled, to show what temperature does."""


async def examination(server: str, folder: Path) -> dict[str, Any]:
    """Asks everything and returns what `examination.json` holds."""
    vocabulary = tokenizer.load(folder)
    maker = tasks.TaskMaker(_SEED, lambda text: len(vocabulary.encode(text).ids))
    skills: dict[str, dict[str, Any]] = {}
    async with AsyncClient(server) as client:
        for skill in maker.skills():
            answers = await examine.ask(client, maker.tasks(skill), _shown(skill.name, skill.count))
            skills[skill.name] = {
                "count": skill.count,
                "bar": skill.bar,
                "right": examine.share_right(answers),
                "ended": sum(answer.ended for answer in answers) / len(answers),
                "wrong": [_described(answer) for answer in answers if not answer.is_right][:5],
            }
        temperatures = {str(heat): await _sampled(client, maker, heat) for heat in (_COOL, _HOT)}
        first = [tasks.first_line(line) for line in conversations.FIRST_LINES]
        lines = await examine.ask(client, first, _shown("first lines", len(first)))
    return {
        "training": _read(folder / "training.json"),
        "skills": skills,
        "temperatures": temperatures,
        "first_lines": [[answer.task.messages[0].content, answer.text] for answer in lines],
    }


async def _sampled(client: AsyncClient, maker: tasks.TaskMaker, temperature: float) -> float:
    """Share of facts that are right to the letter when they are sampled, over all seeds."""
    facts = maker.tasks(tasks.Skill("sampled facts", _SAMPLED_FACTS, 0, tasks.exactly(world.fact)))
    shares = []
    for seed in _SAMPLING_SEEDS:
        shown = _shown(f"facts at temperature {temperature}, seed {seed}", len(facts))
        answers = await examine.ask(client, facts, shown, temperature=temperature, top_p=1.0, seed=seed)
        shares.append(examine.share_right(answers))
    return sum(shares) / len(shares)


def write_card(folder: Path, found: dict[str, Any]) -> None:
    """Writes the card of a model from its files and its examination."""
    training = _read(folder / "training.json")
    config, generation = _read(folder / "config.json"), _read(folder / "generation_config.json")
    again = _read(path) if (path := folder / "trained_again.json").exists() else None
    values = {
        "parameters": f"{training['parameters'] / 1e6:.2f}",
        "shape": (
            f"{config['num_hidden_layers']} layers of width {config['hidden_size']},"
            f" {config['num_attention_heads']} query and {config['num_key_value_heads']} key-value heads of"
            f" {config['head_dim']}, feed-forward {config['intermediate_size']}, tied embeddings"
        ),
        "context": f"{config['max_position_embeddings']:,}",
        "longest": f"{max(phase.longest for phase in recipe.full().phases):,}",
        "vocabulary": f"{config['vocab_size']:,}",
        "megabytes": f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f}",
        "temperature": generation["temperature"],
        "top_p": generation["top_p"],
        "tokens": f"{training['training_tokens'] / 1e6:.1f}",
        "minutes": round(training["training_seconds"] / 60),
        "hardware": training["hardware"],
        "perplexity": training["held_out_perplexity"],
        "positions": _positions(training["perplexity_by_position"]),
        "results": _results(found, again),
        "sampled": _SAMPLED_FACTS,
        "seeds": len(_SAMPLING_SEEDS),
        "cool": f"{found['temperatures'][str(_COOL)]:.0%}",
        "hot": f"{found['temperatures'][str(_HOT)]:.0%}",
        "cool_temperature": _COOL,
        "hot_temperature": _HOT,
        "first_lines": _table(("line", "answer"), found["first_lines"]),
        "again": _again(again),
    }
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(values)
    (folder / "README.md").write_text(text.rstrip() + "\n", encoding="utf-8")


def _again(again: dict[str, Any] | None) -> str:
    """How the other run was made, if there was one."""
    if again is None:
        return ""
    training = again["training"]
    return (
        f"The last column of the table is another run of the same scripts, from seed {training['seed']}:"
        f" {training['training_tokens'] / 1e6:.1f} million tokens in {training['training_seconds'] / 60:.0f} minutes on"
        f" {training['hardware']}, held-out perplexity {training['held_out_perplexity']}."
    )


def _results(found: dict[str, Any], again: dict[str, Any] | None) -> str:
    """The table of what was examined; with a column for another run, if there was one."""
    head = ["", "asked", "right", "promised", *(["another seed"] if again else [])]
    rows = []
    for name, item in found["skills"].items():
        row = [name, str(item["count"]), f"{item['right']:.1%}", f"{item['bar']:.0%}" if item["bar"] else ""]
        rows.append([*row, *([f"{again['skills'][name]['right']:.1%}"] if again else [])])
        if "stories" in name:
            ended = ["stories end by themselves", str(item["count"]), f"{item['ended']:.1%}", "90%"]
            rows.append([*ended, *([f"{again['skills'][name]['ended']:.1%}"] if again else [])])
    return _table(head, rows)


def _positions(figures: Sequence[Sequence[float]]) -> str:
    ranges = [f"{first:.0f} to {last:.0f}" for first, last, _ in figures]
    return _table(("position", *ranges), [("perplexity", *(f"{perplexity:.3f}" for _, _, perplexity in figures))])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that Markdown shows as it is within a table."""
    for mark in "\\|*_<`":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", "<br>")


def _described(answer: Answered) -> list[str]:
    return [answer.task.messages[-1].content, answer.task.expected, answer.text]


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _shown(name: str, count: int) -> Callable[[int], None]:
    """Shows the progress of one kind of task on one line."""

    def show(done: int) -> None:
        if done == count or sys.stderr.isatty():
            print(f"\r{name}: {done}/{count}", end="\n" if done == count else "", file=sys.stderr, flush=True)

    return show


@contextmanager
def _system(model: Path) -> Iterator[str]:
    """A system on a model; gives its address."""
    command = [str(Path(sys.executable).with_name("fermata-server")), "up", "--port", "0", "--model", str(model)]
    with tempfile.TemporaryDirectory(prefix="fermata-card-") as state:
        process = subprocess.Popen(
            [*command, "--state-dir", state, "--threads", str(os.cpu_count() or 1)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("ready "):
                raise SystemExit("the system did not start")
            yield line.removeprefix("ready ").strip()
        finally:
            process.terminate()
            process.wait()


def main(arguments: list[str] | None = None) -> None:
    """Examines a model and writes its card."""
    parser = argparse.ArgumentParser(description="Examines a model and writes its card.")
    parser.add_argument("--model", type=Path, default=tokenizer.FOLDER, help="folder of the model")
    parser.add_argument("--write-only", action="store_true", help="write the card from the examination that is there")
    options = parser.parse_args(arguments)
    path = options.model / "examination.json"
    if not options.write_only:
        with _system(options.model.resolve()) as server:
            found = asyncio.run(examination(server, options.model))
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    found = _read(path)
    write_card(options.model, found)
    for name, item in found["skills"].items():
        print(f"{item['right']:7.1%}  {name}")
    for temperature, share in found["temperatures"].items():
        print(f"{share:7.1%}  facts at temperature {temperature}")


if __name__ == "__main__":
    main()
