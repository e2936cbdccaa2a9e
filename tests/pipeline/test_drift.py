"""Exposure bias, measured against real models: what is planted in a reference is found, and nothing else."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from fermata import AsyncClient, DriftIds, DriftText, FermataError, FinishReason, Options, measure_drift
from tests.pipeline.house import House

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

GREEDY: Options = {"temperature": 0.0, "repetition_penalty": 1.0}
CONTEXT = (10, 20, 30)
LENGTH, CHANGED = 12, 5


async def greedy(client: AsyncClient, token_ids: tuple[int, ...], count: int) -> tuple[int, ...]:
    options: Options = {**GREEDY, "token_ids": token_ids, "max_tokens": count}
    return (await client.generate(**options)).token_ids


async def test_a_model_does_not_drift_from_itself(house: House) -> None:
    async with AsyncClient(house.address) as client:
        own = await greedy(client, CONTEXT, LENGTH)
        curve = await measure_drift(client, [DriftIds(CONTEXT, own)])
    assert [span.tokens for span in curve.offsets] == [1] * len(own)
    assert (curve.total.teacher_forced_errors, curve.total.free_running_errors) == (0, 0)


async def test_a_changed_token_is_found(house: House) -> None:
    done: list[tuple[int, int]] = []
    async with AsyncClient(house.address) as client:
        own = await greedy(client, CONTEXT, LENGTH)
        changed = (*own[:CHANGED], own[CHANGED] + 1, *own[CHANGED + 1 :])
        chosen = [await greedy(client, CONTEXT + changed[:offset], 1) for offset in range(len(changed))]
        curve = await measure_drift(
            client, [DriftIds(CONTEXT, changed)] * 2, progress=lambda *counts: done.append(counts)
        )
        short = await measure_drift(client, [DriftIds(CONTEXT, changed)], longest=CHANGED)
    assert [span.teacher_forced for span in curve.offsets] == [
        float(token_ids != (wanted,)) for token_ids, wanted in zip(chosen, changed, strict=True)
    ]
    assert [span.free_running for span in curve.offsets] == [float(offset == CHANGED) for offset in range(LENGTH)]
    assert curve.offsets[CHANGED].teacher_forced == 1.0
    assert curve.offsets[CHANGED - 1].teacher_forced == 0.0
    assert (short.total.tokens, short.total.teacher_forced, short.total.free_running) == (CHANGED, 0.0, 0.0)
    assert done == [(1, 2), (2, 2)]


async def test_the_end_of_an_answer_is_one_of_its_tokens(built_in_house: House) -> None:
    messages = [{"role": "user", "content": "hello"}]
    async with AsyncClient(built_in_house.address) as client:
        options: Options = {**GREEDY, "messages": messages, "max_tokens": 64}
        answer = await client.generate(**options)
        assert answer.finish_reason is FinishReason.STOP_TOKEN
        curve = await measure_drift(client, [DriftText(messages, answer.text)])
        longer = await measure_drift(client, [DriftText(messages, answer.text + " x")])
    assert curve.total.tokens == len(answer.token_ids)
    assert (curve.total.teacher_forced_errors, curve.total.free_running_errors) == (0, 0)
    # Left alone the model ends where the reference goes on: everything from there on is missed.
    assert longer.offsets[-1].free_running == 1.0


async def test_a_text_that_does_not_fit_is_named(house: House) -> None:
    async with AsyncClient(house.address) as client:
        texts = [DriftIds(CONTEXT, (1, 2)), DriftIds((5,) * 100_000, (1, 2))]
        with pytest.raises(FermataError) as failure:
            await measure_drift(client, texts)
    assert failure.value.__notes__ == ["at text 2 of 2"]


async def test_the_command_prints_the_curve(built_in_house: House, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "zebra zebra"}]
    path.write_text(json.dumps({"messages": messages}) + '\n{"prompt": "Once upon", "completion": " a time"}\n')

    async def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "fermata.cli", "drift", str(path), "--server", built_in_house.address]
        process = await asyncio.create_subprocess_exec(
            *command, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        output, errors = await process.communicate()
        assert (process.returncode, errors) == (0, b"")
        return output.decode()

    heading, first, *_, summary = (await run("--longest", "3")).splitlines()
    assert heading.split() == ["OFFSETS", "TOKENS", "TEACHER-FORCED", "FREE-RUNNING", "GAP"]
    assert first.split()[:2] == ["0", "2"]
    assert " in 2 texts " in summary
    found = json.loads(await run("--json", "--limit", "1"))
    assert found["texts"] == 1
    assert found["offsets"][0]["teacher_forced"] == found["offsets"][0]["free_running"] == 1.0
