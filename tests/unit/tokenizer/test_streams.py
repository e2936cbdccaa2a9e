"""Streams through the public port: the text is whole over any cutting, and everything that was asked for is there."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fermata.running_hash import hash_ids
from fermata.v1 import common_pb2, sampling_pb2
from fermata.v1 import generation_pb2 as public
from services.orchestrator.v1 import orchestrator_pb2 as pb
from services.tokenizer.codec import Codec
from tests.unit.tokenizer.fake_orchestrator import SEED, SESSION, FakeGeneration
from tests.unit.tokenizer.house import (
    SMALL_WINDOW,
    TEXT,
    Received,
    house_of,
    in_big_messages,
    read_some,
    until,
)


def byte_ids(codec: Codec, text: str) -> list[int]:
    """One id per byte: every character of more than one byte is cut inside."""
    of_byte = {piece: token_id for token_id, piece in enumerate(codec.vocabulary.table) if len(piece) == 1}
    return [of_byte[bytes([byte])] for byte in text.encode()]


def cutting(seed: int) -> Iterator[int]:
    source = random.Random(seed)
    while True:
        yield source.choice((1, 1, 1, 2, 3, 7, 20))


async def test_a_stream_from_start_to_end(codec: Codec) -> None:
    output = codec.encode(TEXT)
    async with house_of(codec, [output], endpoints=("other:1", "other:2", "other:3", "other:4")) as house:
        received = await Received().read(house.stream())
        (started,) = received.started
        own = f"127.0.0.1:{house.tokenizer.own_port}"
    assert received.text == {0: TEXT}
    assert received.ids == {0: output}
    assert (started.session_id, started.n, started.seed) == (SESSION, 1, SEED)
    assert started.generation_id == f"{SESSION}.{0:016x}"
    assert list(started.endpoints) == [own, "other:1", "other:2", "other:3"]
    assert started.cached_tokens == 3
    assert received.finished[0].finish_reason == common_pb2.FINISH_REASON_MAX_TOKENS
    assert received.finished[0].usage == public.Usage(
        prompt_tokens=started.prompt_tokens, output_tokens=len(output), cached_tokens=3
    )


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(max_size=60), min_size=1, max_size=3),
    stop=st.sampled_from(["", "日本", "aa", "\n\n", "ö"]),
    seed=st.integers(0, 1000),
    single=st.booleans(),
)
def test_texts_are_whole_whatever_messages_are_cut_into(
    codec: Codec, texts: list[str], stop: str, seed: int, single: bool
) -> None:
    """R2: whichever tokens a message ends with, and wherever a second reader begins."""
    outputs = [byte_ids(codec, text) if single else codec.encode(text) for text in texts]

    async def scenario() -> None:
        def plan(request: pb.OpenRequest, generation_id: str) -> FakeGeneration:
            generation = FakeGeneration(generation_id, request, outputs, codec.vocabulary)
            generation.cuts = lambda: cutting(seed)
            generation.log()
            return generation

        async with house_of(codec, plan) as house:
            stop_rules = sampling_pb2.StoppingParams(strings=[stop] if stop else [])
            received = await Received().read(house.stream(n=len(outputs), stop=stop_rules))
            assert received.text == dict(enumerate(texts))
            name = public.GenerationName(generation_id=received.started[0].generation_id)
            counts = {i: random.Random(seed + i).randint(0, len(output)) for i, output in enumerate(outputs)}
            cursors = [
                common_pb2.Cursor(choice=i, count=count, running_hash=hash_ids(outputs[i][:count]))
                for i, count in counts.items()
            ]
            resumed = Received(counts)
            await resumed.read(house.generation.Resume(public.ResumeRequest(generation=name, cursors=cursors)))
            generation = house.log.generations[name.generation_id]
            for i, count in counts.items():
                assert resumed.ids.get(i, []) == outputs[i][count:]
                hidden = generation.held(i, count)
                said = codec.vocabulary.bytes_of(outputs[i][:count])
                shown = said[: len(said) - hidden].decode(errors="ignore")
                assert shown + resumed.text[i] == texts[i]

    asyncio.run(scenario())


async def test_what_is_cut_off_a_stop_is_never_shown(codec: Codec) -> None:
    def plan(request: pb.OpenRequest, generation_id: str) -> FakeGeneration:
        generation = FakeGeneration(
            generation_id, request, [byte_ids(codec, "so far, so good. STOP it")], codec.vocabulary
        )
        generation.reason, generation.cut_bytes = common_pb2.FINISH_REASON_STOP_STRING, len("STOP it")
        generation.log()
        return generation

    async with house_of(codec, plan) as house:
        # The fake holds what the orchestrator would: here all that a stop string of this length could still be.
        received = await Received().read(house.stream(stop=sampling_pb2.StoppingParams(strings=["STOP it!"])))
    assert received.text == {0: "so far, so good. "}
    assert len(received.ids[0]) == len("so far, so good. STOP it")


async def test_logprobs_are_passed_on(codec: Codec) -> None:
    output = codec.encode(TEXT)
    async with house_of(codec, [output]) as house:
        options = sampling_pb2.OutputOptions(top_logprobs=2)
        received = await Received().read(house.stream(output=options))
        request = public.GenerationRequest(prompt="x", output=options)
        whole = await house.generation.Generate(public.GenerateRequest(generation=request))
    expected = [-float(token_id) for token_id in output]
    assert received.logprobs == expected == list(whole.choices[0].logprobs)
    assert [list(top.token_ids) for top in received.tops] == [[token_id, token_id + 1] for token_id in output]
    assert list(whole.choices[0].top_logprobs) == received.tops


async def test_generate_returns_the_whole(codec: Codec) -> None:
    outputs = [codec.encode(TEXT), codec.encode("x"), []]
    async with house_of(codec, outputs) as house:
        request = public.GenerateRequest(generation=public.GenerationRequest(prompt="x", n=3))
        whole = await house.generation.Generate(request)
        await until(lambda: house.first.detaches)
    assert [choice.text for choice in whole.choices] == [TEXT, "x", ""]
    assert [list(choice.token_ids) for choice in whole.choices] == outputs
    assert whole.started.n == 3
    assert [choice.finished.text for choice in whole.choices] == ["", "", ""]
    assert [choice.finished.count for choice in whole.choices] == [len(output) for output in outputs]


async def test_final_only_sends_the_whole_text_with_the_end(codec: Codec) -> None:
    async with house_of(codec, [codec.encode(TEXT)]) as house:
        received = await Received().read(house.stream(output=sampling_pb2.OutputOptions(final_only=True)))
    assert received.token_events == 0
    assert received.finished[0].text == TEXT


async def test_tokens_that_wait_for_a_write_are_joined(codec: Codec) -> None:
    """R5: a reader that takes nothing for a while gets fewer and bigger messages."""
    output = codec.encode(TEXT * 6000)
    async with house_of(codec, in_big_messages(codec, output, 1000), channel_options=SMALL_WINDOW) as house:
        received, call = Received(), house.stream()
        await read_some(received, call, 1)
        await until(lambda: house.first.acknowledged > len(output) / 1000)  # all is taken in, and not read
        await received.read(call)
    assert received.text[0] == TEXT * 6000
    assert received.token_events < len(output) / 1000 / 2
