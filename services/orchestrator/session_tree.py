"""Sessions as trees of generations (R17): from records to id sequences. Pure.

Knows records only; where they are kept and who runs them is others' business.
"""

from __future__ import annotations

from collections.abc import Mapping

from services.common.errors import GenerationNotFound, LogLost
from services.orchestrator.session_records import GenerationRecord


def path_from_root(records: Mapping[str, GenerationRecord], generation: str) -> list[GenerationRecord]:
    """The generations from the root to `generation`, which is the last.

    Raises:
        GenerationNotFound: there is no such generation.
        LogLost: a parent is missing.
    """
    if generation not in records:
        raise GenerationNotFound("the session has no such generation", metadata={"generation_id": generation})
    path = [records[generation]]
    while path[-1].parent.generation:
        parent = records.get(path[-1].parent.generation)
        if parent is None or parent in path:
            raise LogLost("an earlier turn of the session is missing", metadata={"session_id": path[-1].session})
        path.append(parent)
    return path[::-1]


def context_after(path: list[GenerationRecord], choice: int, count: int | None = None) -> list[int]:
    """The whole id sequence up to `count` output tokens (None: all) of a choice of the last generation."""
    context: list[int] = []
    for record, child in zip(path, [*path[1:], None], strict=True):
        context += record.prompt_ids
        if child is not None:
            context += record.logs[child.parent.choice][: child.parent.count]
    return context + path[-1].logs[choice][:count]


def context_before(path: list[GenerationRecord]) -> list[int]:
    """The id sequence before the output of the last generation."""
    return context_after(path, 0, 0)
