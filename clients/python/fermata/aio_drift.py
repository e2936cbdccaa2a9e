"""Measures exposure bias: asks a server what it would say after each part of a text, and what it says by itself.

Knows the public calls and which of them may run at once; what is counted is decided in `drift.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterable
from itertools import takewhile
from typing import Any, TypeVar

from fermata.aio import AsyncClient
from fermata.drift import DriftComparison, DriftCurve, DriftIds, DriftText, missed
from fermata.errors import FermataError
from fermata.requests import Options

Result = TypeVar("Result")

REQUESTS_AT_ONCE = 24

# More than one, so that others fill the batch while one text is generated token by token; few, so that the KV cache
# still has a text's context when its offsets are asked for.
_TEXTS_AT_ONCE = 4

# Penalties of the model's own defaults would make the two errors differ by more than what the model was given.
_GREEDY: Options = {
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "n": 1,
}


async def measure_drift(
    client: AsyncClient,
    texts: Iterable[DriftText | DriftIds],
    *,
    longest: int = 64,
    requests_at_once: int = REQUESTS_AT_ONCE,
    progress: Callable[[int, int], None] | None = None,
) -> DriftCurve:
    """Measures teacher-forced and free-running error along texts.

    Each text costs one greedy generation and one request for one token per offset.

    Args:
        client: asks the server.
        texts: what the model is compared with; at least one.
        longest: most tokens of each reference that are compared; at least 1.
        requests_at_once: most generations that run at the same time.
        progress: called after each text with the number of texts that are done and of all.

    Returns:
        The curve over all texts.

    Raises:
        FermataError: the server refused or failed; a note says at which text.
        ValueError: there is no token to compare.
    """
    given = list(texts)
    end_ids = {token_id for model in await client.models() for token_id in model.eos_token_ids}
    requests, open_texts = asyncio.Semaphore(requests_at_once), asyncio.Semaphore(_TEXTS_AT_ONCE)
    done = 0

    async def compare(number: int, text: DriftText | DriftIds) -> DriftComparison:
        nonlocal done
        async with open_texts:
            try:
                ids = text if isinstance(text, DriftIds) else await encode(client, text, end_ids)
                comparison = await _compare(client, ids.context, ids.reference[:longest], requests)
            except FermataError as error:
                error.add_note(f"at text {number} of {len(given)}")
                raise
        done += 1
        if progress is not None:
            progress(done, len(given))
        return comparison

    return DriftCurve.of(await _all(compare(number, text) for number, text in enumerate(given, 1)))


async def encode(client: AsyncClient, text: DriftText, end_ids: Collection[int]) -> DriftIds:
    """Encodes a text as the model would have to write it.

    The reference's ids are those that stand behind the context's when both are encoded together; only where a
    template or the tokenizer does not put it there is the reference encoded alone.

    Args:
        client: asks the server.
        text: the text.
        end_ids: the model's end tokens; one that the template puts after the reference belongs to it.

    Returns:
        The ids of context and reference.

    Raises:
        FermataError: the server refused or failed.
    """
    if isinstance(text.context, str):
        context = await _tokenized(client, text.context, add_special=True)
        whole = await _tokenized(client, text.context + text.reference, add_special=True)
        return DriftIds(context, _behind(context, whole) or await _tokenized(client, text.reference))
    messages = [*text.context, {"role": "assistant", "content": text.reference}]
    context = (await client.apply_chat_template(text.context)).token_ids
    # A template is only ever asked to open a message, so behind the reference and its end stands the next one's head.
    closed = (await client.apply_chat_template(messages)).token_ids
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(context, closed, strict=False)))
    end = next((place for place in range(common, len(closed)) if closed[place] in end_ids), None)
    if end is not None and common == len(context):
        return DriftIds(context, closed[common : end + 1])
    unclosed = (await client.apply_chat_template(messages, continue_final_message=True)).token_ids
    reference = _behind(context, unclosed) or await _tokenized(client, text.reference)
    return DriftIds(context, reference if end is None else (*reference, closed[end]))


async def _compare(
    client: AsyncClient, context: tuple[int, ...], reference: tuple[int, ...], requests: asyncio.Semaphore
) -> DriftComparison:
    async def said(token_ids: tuple[int, ...], count: int) -> tuple[int, ...]:
        """What the model says next; a stop token is the last of it."""
        options: Options = {**_GREEDY, "token_ids": token_ids, "max_tokens": count}
        async with requests:
            return (await client.generate(**options)).token_ids

    if not reference:
        return DriftComparison((), ())
    # First, because it leaves the context in the cache, where all requests for one token then find it.
    alone = await said(context, len(reference))
    told = await _all(said(context + reference[:offset], 1) for offset in range(len(reference)))
    teacher_forced = tuple(chosen != (token_id,) for chosen, token_id in zip(told, reference, strict=True))
    return DriftComparison(teacher_forced, missed(reference, alone))


async def _tokenized(client: AsyncClient, text: str, *, add_special: bool = False) -> tuple[int, ...]:
    return tuple(piece.token_id for piece in await client.tokenize(text, add_special=add_special))


def _behind(context: tuple[int, ...], whole: tuple[int, ...]) -> tuple[int, ...]:
    """What `whole` has behind the context; nothing when it does not begin with it."""
    return whole[len(context) :] if whole[: len(context)] == context else ()


async def _all(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Their results in order. The first failure ends the others, and is raised as it is instead of in a group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as failures:
        first = failures.exceptions[0]
    else:
        return [task.result() for task in tasks]
    raise first  # out here it keeps its own cause
