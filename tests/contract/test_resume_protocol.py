"""`clients/RESUME.md` by raw stubs: streams, cursors, names, several readers, ends.

What breaks, and what a log can lose, is in `test_resume_loss.py`.
"""

from __future__ import annotations

import asyncio
import functools
import random
import re
import secrets
from pathlib import Path

import grpc
import pytest
from grpc import aio

from fermata.v1 import common_pb2, text_pb2
from fermata.v1 import generation_pb2 as pb
from fermata.v1.generation_pb2_grpc import GenerationServiceStub
from fermata.v1.text_pb2_grpc import TokenizerServiceStub
from services.common.vocabulary import IncrementalText, Vocabulary
from tests.contract.raw_reader import RawReader, extend
from tests.contract.requests import (
    eventually,
    generate,
    has,
    honest,
    new_request,
    own_ids,
    parked_log,
    refusal,
    same,
    total,
    undisturbed,
    with_stop_string,
)
from tests.pipeline.house import House

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]

PAGE = Path(__file__).resolve().parents[2] / "clients" / "RESUME.md"


async def test_the_hashes_that_the_page_gives() -> None:
    running_hash, hashes = bytes(8), []
    for token_id in (1, 2, 70000):
        running_hash = extend(running_hash, token_id)
        hashes.append(running_hash.hex())
    assert re.findall(r"\b[0-9a-f]{16}\b", PAGE.read_text()) == hashes


async def test_a_stream_is_what_generate_returns(house: House) -> None:
    """R2, R7, R16, R18: three choices, events in their order."""
    request = new_request(n=3)
    expected = await undisturbed(house, request)
    reader = await RawReader(house.address, request=own_ids(request)).read()
    same(reader, expected)
    assert reader.events[0] == "started"
    assert (reader.events.count("started"), reader.events.count("finished")) == (1, 3)
    assert reader.endpoints == [f"127.0.0.1:{house.ports[f'tokenizer {index}']}" for index in range(2)]
    assert reader.spoke == [house.address]


async def test_a_stop_string_is_never_shown(house: House) -> None:
    """R2, R3: the text goes up to the stop string, the log up to the token that completes it."""
    whole = (await undisturbed(house, new_request(n=3))).choices[0]
    request = await with_stop_string(house, new_request(n=3))
    stop = request.stop.strings[0]
    reader = await RawReader(house.address, request=own_ids(request)).read()
    choice = reader.choices[0]
    assert choice.text == whole.text[: whole.text.index(stop)]
    assert choice.finished is not None
    assert choice.finished.stop_string == stop
    async with aio.insecure_channel(house.address) as channel:
        texts = TokenizerServiceStub(channel)
        ids = [common_pb2.TokenIds(ids=whole.token_ids[:count]) for count in (choice.count - 1, choice.count)]
        said = [(await texts.Detokenize(text_pb2.DetokenizeRequest(token_ids=given))).text for given in ids]
    assert [stop in text for text in said] == [False, True]


async def test_interrupted_at_random_cursors(house: House) -> None:
    """R4, R6, R16: every call breaks off somewhere, the next one goes on at any tokenizer."""
    request = await with_stop_string(house, new_request(n=3))
    expected = await undisturbed(house, request)
    chance = random.Random(4)
    for _ in range(2):
        reader = RawReader(house.address, request=own_ids(request))
        while not reader.complete:
            goal = total(reader) + chance.randint(1, 60)
            await reader.call(chance.choice([house.address, *reader.endpoints]), functools.partial(has, goal))
        same(reader, expected)
        assert len(reader.spoke) > 2


async def test_an_ended_generation_from_any_cursor(house: House) -> None:
    """R2: what comes after a cursor continues exactly the text before it."""
    request = new_request(n=2, max_tokens=48, temperature=0.8)
    expected = await generate(house, request)
    name = pb.GenerationName(generation_id=expected.started.generation_id)
    chance = random.Random(5)
    vocabulary = Vocabulary.from_file(Path(house.model) / "tokenizer.json")
    for _ in range(20):
        reader = RawReader(house.address, name=name)
        for choice in expected.choices:
            reader.choices[choice.choice].append(choice.token_ids[: chance.randint(0, len(choice.token_ids))])
        before = {index: list(choice.token_ids) for index, choice in reader.choices.items()}
        await reader.read()
        for choice in expected.choices:
            said = IncrementalText().extend(vocabulary.bytes_of(before[choice.choice]))
            assert reader.choices[choice.choice].token_ids == choice.token_ids
            assert said + reader.choices[choice.choice].text == choice.text
        assert set(reader.spoke) == {house.address}


async def test_an_ended_generation_is_read_again_and_stays_as_it_is(house: House) -> None:
    expected = await generate(house, new_request(n=2))
    name = pb.GenerationName(generation_id=expected.started.generation_id)
    for _ in range(2):
        reader = await RawReader(house.address, name=name).read()
        same(reader, expected)
    ends = {index: choice.finished for index, choice in reader.choices.items()}
    # All of it once more with the cursors at the end: each end comes again, and nothing else.
    reader.events.clear()
    await reader.call(house.address)
    assert reader.events == ["started", "finished", "finished"]
    assert {index: choice.finished for index, choice in reader.choices.items()} == ends
    same(reader, expected)


async def test_a_second_reader_from_the_start(house: House) -> None:
    """R5: readers do not concern each other, wherever they read."""
    request = new_request(n=2, max_tokens=120)
    expected = await undisturbed(house, request)
    first = RawReader(house.address, request=own_ids(request))
    reading = asyncio.create_task(first.read())
    await eventually(lambda: total(first) >= 40)
    second, third = (RawReader(address, name=first.name) for address in first.endpoints)
    assert not first.complete
    for reader in await asyncio.gather(reading, second.read(), third.read()):
        same(reader, expected)
        assert reader.started is not None
        assert reader.started.generation_id == first.started.generation_id  # type: ignore[union-attr]


async def test_resuming_by_request_id(house: House) -> None:
    """R14: a program that knows nothing but its request finds what came of it, in a new session or a named one."""
    opened = await generate(house, new_request(max_tokens=4))
    for session_id in ("", opened.started.session_id):
        request = own_ids(new_request(max_tokens=100, session_id=session_id))
        first = RawReader(house.address, request=request)
        await first.call(house.address, functools.partial(has, 10))
        name = pb.GenerationName(request_id=request.request_id, session_id=session_id)
        second = await RawReader(house.address, name=name).read()
        assert second.started is not None
        assert second.name == first.name
        assert second.choices[0].token_ids[: first.choices[0].count] == first.choices[0].token_ids
        assert second.choices[0].count == 100
    code, info = await refusal(house, pb.ResumeRequest(generation=pb.GenerationName(request_id="nobody's")))
    assert code is grpc.StatusCode.NOT_FOUND
    assert info.reason in ("SESSION_NOT_FOUND", "GENERATION_NOT_FOUND")


async def test_the_same_request_id_is_the_same_generation(house: House) -> None:
    """R14: retries at the same time and later, at any tokenizer; another body is refused."""
    request = own_ids(new_request(n=2))
    addresses = [f"127.0.0.1:{house.ports[f'tokenizer {index}']}" for index in (0, 1, 0, 1)]
    readers = await asyncio.gather(*(RawReader(address, request=request).read() for address in addresses))
    later = await generate(house, request)
    assert {reader.started.generation_id for reader in readers} == {later.started.generation_id}  # type: ignore[union-attr]
    for reader in readers:
        same(reader, later)
    other = pb.GenerationRequest()
    other.CopyFrom(request)
    other.sampling.seed += 1
    with pytest.raises(aio.AioRpcError) as caught:
        await RawReader(house.address, request=other).read()
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_cancel_ends_it_for_everybody_once(house: House) -> None:
    """R6, P7, P8: all readers get the same end, which no later call changes."""
    request = own_ids(new_request(n=2, max_tokens=1000))
    readers = [RawReader(house.address, request=request) for _ in range(2)]
    reading = [asyncio.create_task(reader.read()) for reader in readers]
    await eventually(lambda: all(total(reader) >= 20 for reader in readers))
    name = readers[0].name
    by_request = pb.GenerationName(request_id=request.request_id)
    async with aio.insecure_channel(house.address) as channel:
        stub = GenerationServiceStub(channel)
        answers = [await stub.Cancel(pb.CancelRequest(generation=given)) for given in (name, name, by_request)]
        stored = await stub.GetGeneration(pb.GetGenerationRequest(generation=name))
    for reader in await asyncio.gather(*reading):
        assert {choice.finished.finish_reason for choice in reader.choices.values() if choice.finished} == {
            common_pb2.FINISH_REASON_CANCELLED
        }
    assert [list(answer.finished) for answer in answers] == [[choice.finished for choice in stored.choices]] * 3
    assert stored.state == pb.GENERATION_STATE_FINISHED
    again = await RawReader(house.address, name=name).read()
    for reader in (*readers, again):
        assert {index: choice.token_ids for index, choice in reader.choices.items()} == {
            choice.choice: choice.token_ids for choice in stored.choices
        }
        assert {index: choice.text for index, choice in reader.choices.items()} == {
            choice.choice: choice.text for choice in stored.choices
        }


async def test_cancel_leaves_an_end_as_it_is(house: House) -> None:
    ended = await generate(house, new_request())
    name = pb.GenerationName(generation_id=ended.started.generation_id)
    async with aio.insecure_channel(house.address) as channel:
        answer = await GenerationServiceStub(channel).Cancel(pb.CancelRequest(generation=name))
    assert list(answer.finished) == [choice.finished for choice in ended.choices]
    assert answer.finished[0].finish_reason == common_pb2.FINISH_REASON_MAX_TOKENS


async def test_a_deadline_ends_the_reading_alone(house: House) -> None:
    """R6: the generation is parked, and goes on when it is resumed."""
    request = own_ids(new_request(max_tokens=1000))
    name = pb.GenerationName(request_id=request.request_id)
    async with aio.insecure_channel(house.address) as channel:
        stub = GenerationServiceStub(channel)
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(generation=request), timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    parked = await parked_log(house, name)
    reader = await RawReader(house.address, name=name).read(functools.partial(has, len(parked) + 20))
    assert reader.choices[0].token_ids[: len(parked)] == parked


async def test_the_whole_text_at_the_end(house: House) -> None:
    """`final_only`: no tokens come, and a resumed reading says the same."""
    request = await with_stop_string(house, new_request(n=2))
    expected = await undisturbed(house, request)
    request.output.final_only = True
    reader = await RawReader(house.address, request=own_ids(request)).read()
    again = await RawReader(house.address, name=reader.name).read()
    for read in (reader, again):
        assert read.events.count("tokens") == 0
        texts = [read.choices[choice.choice].text for choice in expected.choices]
        assert texts == [choice.text for choice in expected.choices]


async def test_other_tokens_than_those_of_the_log(house: House) -> None:
    """R15: the log wins, never silently; without cursors it can be read."""
    ended = await generate(house, new_request(n=2))
    name = pb.GenerationName(generation_id=ended.started.generation_id)
    ids = list(ended.choices[1].token_ids)
    for count in (1, 20, len(ids)):
        cursors = [honest(0, ended.choices[0].token_ids[:5]), honest(1, [*ids[: count - 1], ids[count - 1] ^ 1])]
        code, info = await refusal(house, pb.ResumeRequest(generation=name, cursors=cursors))
        assert (code, info.reason) == (grpc.StatusCode.DATA_LOSS, "LOG_DIVERGED")
        assert dict(info.metadata) == {"choice": "1", "count": str(len(ids))}
    too_long = common_pb2.Cursor(choice=1, count=len(ids) + 1)
    for cursor in (too_long, honest(1, [*ids, 7])):
        code, info = await refusal(house, pb.ResumeRequest(generation=name, cursors=[cursor]))
        assert (code, info.reason) == (grpc.StatusCode.OUT_OF_RANGE, "CURSOR_OUT_OF_RANGE")
        assert dict(info.metadata) == {"choice": "1", "count": str(len(ids))}
    unchecked = common_pb2.Cursor(choice=1, count=3)  # no hash: told a count, has no ids
    async with aio.insecure_channel(house.address) as channel:
        call = GenerationServiceStub(channel).Resume(pb.ResumeRequest(generation=name, cursors=[unchecked]))
        events = [response.event async for response in call]
    tokens = [event.tokens for event in events if event.WhichOneof("event") == "tokens" and event.tokens.choice == 1]
    assert tokens[0].first_offset == 3
    same(await RawReader(house.address, name=name).read(), ended)


async def test_cursors_and_tails_without_sense(house: House) -> None:
    ended = await generate(house, new_request(n=2))
    name = pb.GenerationName(generation_id=ended.started.generation_id)
    ids = ended.choices[0].token_ids
    bad = [
        pb.ResumeRequest(cursors=[common_pb2.Cursor(choice=2)]),
        pb.ResumeRequest(cursors=[common_pb2.Cursor(choice=0), common_pb2.Cursor(choice=0)]),
        pb.ResumeRequest(cursors=[common_pb2.Cursor(choice=0, count=3, running_hash=secrets.token_bytes(7))]),
        pb.ResumeRequest(tails=[common_pb2.Tail(choice=0, token_ids=ids[:3])]),
        pb.ResumeRequest(
            cursors=[honest(0, ids[:5])], tails=[common_pb2.Tail(choice=0, first_offset=1, token_ids=ids[1:4])]
        ),
    ]
    for request in bad:
        request.generation.CopyFrom(name)
        code, info = await refusal(house, request)
        assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"), request
