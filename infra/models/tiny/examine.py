"""Asks a running system what the model is examined in, and counts the right answers.

Everything goes through the public API, as any client's requests do. Knows no weights and no file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Unpack

from fermata import AsyncClient, FinishReason, Options
from infra.models.tiny.tasks import Task

_AT_ONCE = 16
_LONGEST_ANSWER = 500


@dataclass(frozen=True, slots=True)
class Answered:
    """A task and what the model said.

    Attributes:
        task: what was asked.
        text: the answer.
        ended: the model ended it by itself.
    """

    task: Task
    text: str
    ended: bool

    @property
    def is_right(self) -> bool:
        """Whether the answer is right, and whole."""
        return self.ended and self.task.is_right(self.text)


async def ask(
    client: AsyncClient, tasks: Sequence[Task], told: Callable[[int], None], **sampling: Unpack[Options]
) -> list[Answered]:
    """Asks all tasks, several at once.

    Args:
        client: of the system.
        tasks: what to ask.
        told: is called with the number of answers after each.
        sampling: `temperature`, `top_p`, `seed`, ...; nothing means greedy.
    """
    slots = asyncio.Semaphore(_AT_ONCE)
    done = 0

    async def one(task: Task) -> Answered:
        nonlocal done
        messages: list[Mapping[str, str]] = [asdict(message) for message in task.messages]
        options: Options = {"temperature": 0.0, "max_tokens": _LONGEST_ANSWER, **sampling, "messages": messages}
        async with slots:
            generation = await client.generate(**options)
        done += 1
        told(done)
        choice = generation.choices[0]
        return Answered(task, choice.text, choice.finish_reason is FinishReason.STOP_TOKEN)

    return list(await asyncio.gather(*map(one, tasks)))


def share_right(answers: Sequence[Answered]) -> float:
    """Share of right answers."""
    return sum(answer.is_right for answer in answers) / len(answers)
