"""The whole line, undisturbed: exact, shared, and unharmed by bad input beside it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fermata.aio import AsyncClient
from tests.pipeline.house import House, undisturbed

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

PROMPTS = [
    "Say hi", "Tell me a story about a fox and a lantern", "Count from 4 to 11", "What is 3 plus 5?", "Spell house",
    "What colour is the sky?", "hello", "who are you", "Repeat after me: one two three", "the", "a b c d e f g",
    "1 2 3 4 5", "Größe und naïve façade", "漢字", "🦊🏮", "\n\n\n", "   spaces   ", "What is the opposite of hot?",
    "list three animals", "good night",
]  # fmt: skip


async def test_greedy_ids_equal_those_of_transformers(built_in_house: House) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built_in_house.model)
    model: Any = AutoModelForCausalLM.from_pretrained(built_in_house.model, dtype=torch.float32)
    async with AsyncClient(built_in_house.address) as client:
        for number, prompt in enumerate(PROMPTS):
            if number % 2:
                messages = [{"role": "user", "content": prompt}]
                ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
                given: dict[str, Any] = {"messages": messages}
            else:
                ids = tokenizer.encode(prompt, add_special_tokens=False)
                given = {"prompt": prompt}
            result = await client.generate(
                **given, temperature=0.0, repetition_penalty=1.0, max_tokens=64, ignore_eos=True
            )
            with torch.inference_mode():
                expected = model.generate(
                    torch.tensor([ids]),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    max_new_tokens=64,
                    min_new_tokens=64,
                    eos_token_id=None,
                    pad_token_id=0,
                )[0, len(ids) :].tolist()
            assert list(result.choices[0].token_ids) == expected, prompt


async def test_many_clients_share_steps_and_get_what_each_gets_alone(house: House) -> None:
    requests = [
        {"token_ids": [10 + number, 20, 30], "temperature": 1.0, "seed": number, "max_tokens": 96, "ignore_eos": True}
        for number in range(16)
    ]
    alone = [await undisturbed(house.address, request) for request in requests]
    assert house.shard is not None
    before = house.shard.service.load
    together = await asyncio.gather(*(undisturbed(house.address, request) for request in requests))
    after = house.shard.service.load
    assert together == alone
    batch = (after.drawn_tokens - before.drawn_tokens) / (after.drawing_steps - before.drawing_steps)
    assert batch > 8, f"mean batch {batch:.1f}"
    owners = [item.service for item in house.orchestrators if item is not None]
    stored = sum(service.store.appended_tokens for service in owners)
    assert sum(service.store.flushes for service in owners) < stored / 2


async def test_choices_are_as_if_alone_and_share_the_prompt(house: House) -> None:
    options: dict[str, Any] = {"token_ids": list(range(100, 300)), "temperature": 1.0, "seed": 3, "max_tokens": 40}
    three = await undisturbed(house.address, options | {"n": 3})
    assert three[0] == (await undisturbed(house.address, options))[0]
    assert len({output.token_ids for output in three.values()}) == 3


async def test_a_chat_goes_on_by_its_session(built_in_house: House) -> None:
    async with AsyncClient(built_in_house.address) as client:
        first = await client.generate(messages=[{"role": "user", "content": "hello"}], temperature=0.0, max_tokens=30)
        second = await client.generate(
            messages=[{"role": "user", "content": "who are you?"}],
            session_id=first.session_id,
            temperature=0.0,
            max_tokens=30,
        )
        whole = [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": first.choices[0].text},
            {"role": "user", "content": "who are you?"},
        ]
        rendered = await client.apply_chat_template(whole)
        at_once = await client.generate(token_ids=rendered.token_ids, temperature=0.0, max_tokens=30)
        session = await client.get_session(first.session_id)
        assert second.choices[0].text == at_once.choices[0].text
        assert second.session_id == first.session_id
        assert [item.parent_generation_id for item in session.generations] == ["", first.generation_id]
        assert first.session_id in {item.session_id for item in await client.list_sessions()}
