"""ShardService over real sockets: packed results, heartbeats, links that break, owners that change, draining."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc import aio

from services.common import rpc
from services.common.errors import Draining, InvalidRequest, OwnerChanged
from services.common.types import VERSION, pack_ids
from services.shard.v1 import shard_pb2
from tests.unit.shard.fakes import SIZE, VOCABULARY, alone
from tests.unit.shard.links import BLOCKS, CONTEXT, HEARTBEAT, PROMPT, System, admit, serving


@pytest.fixture
async def system() -> AsyncIterator[System]:
    async with serving() as system:
        yield system


async def test_describe_tells_what_is_served(system: System) -> None:
    stub = system.stub()
    described = await stub.Describe(shard_pb2.DescribeRequest())
    assert len(bytes.fromhex(described.process_id)) == 16
    assert described.version == VERSION
    assert (described.fingerprint.model, described.fingerprint.parallel_degree) == ("fake", 1)
    assert (described.context_length, described.vocabulary_size) == (CONTEXT, VOCABULARY)
    assert (described.block_size, described.block_count) == (SIZE, BLOCKS)
    assert (described.step_tokens, described.step_sequences) == (32, 8)
    assert (await stub.Describe(shard_pb2.DescribeRequest())).process_id == described.process_id


async def test_one_message_per_step_whatever_the_batch(system: System) -> None:
    system.runner.delay = 0.02
    link = system.link()
    prompts = {attempt: [attempt, 2, 3] for attempt in range(1, 6)}
    await link.send(*(admit(attempt, prompt) for attempt, prompt in prompts.items()))
    for attempt, prompt in prompts.items():
        assert await link.until_tokens(attempt) == alone(prompt, 8)
    assert [list(step.attempts) for step in link.steps] == [[1, 2, 3, 4, 5]] * 8
    # A busy machine may join two steps in a message; nothing may split one.
    assert sum(bool(message.steps) for message in link.messages) <= 8
    assert [step.number for step in link.steps] == list(range(1, 9))
    assert [list(step.counts) for step in link.steps] == [[count] * 5 for count in range(1, 9)]
    assert [each.attempt for message in link.messages for each in message.admitted] == [1, 2, 3, 4, 5]


async def test_a_step_tells_where_its_time_went(system: System) -> None:
    system.runner.delay = 0.01
    link = system.link()
    await link.send(admit(max_count=2))
    await link.until_tokens(1, 2)
    for step in link.steps:
        assert step.forward_ns >= 10e6
        assert step.started_ns + step.schedule_ns + step.forward_ns + step.sample_ns <= step.departed_ns
    assert link.steps[0].departed_ns <= link.steps[1].started_ns


async def test_each_link_gets_its_own_rows(system: System) -> None:
    system.runner.delay = 0.01
    first, second = system.link(), system.link()
    await first.send(admit(1, [1, 2]), admit(2, [3]))
    await second.send(admit(1, [9, 8], generation_id="another"))
    assert await first.until_tokens(1) == alone([1, 2], 8)
    assert await first.until_tokens(2) == alone([3], 8)
    assert await second.until_tokens(1) == alone([9, 8], 8)
    assert {attempt for step in second.steps for attempt in step.attempts} == {1}


async def test_logprobs_and_top_tokens_are_packed(system: System) -> None:
    link = system.link()
    await link.send(admit(1, max_count=2, logprobs=True, top_logprobs=3), admit(2, [7], max_count=2))
    await link.until_tokens(2, 2)
    step = link.steps[0]
    assert list(step.attempts) == [1, 2]
    assert list(step.top_counts) == [3, 0]
    assert len(step.top_token_ids) == len(step.top_logprobs) == 3
    assert step.top_token_ids[0] == step.token_ids[0]
    assert step.logprobs[0] == step.top_logprobs[0] and len(step.logprobs) == 2
    await link.send(admit(3, max_count=1))
    await link.until_tokens(3, 1)
    assert not link.steps[-1].logprobs and not link.steps[-1].top_counts


async def test_grants_and_releases(system: System) -> None:
    link = system.link()
    await link.send(admit(1, grant=2), admit(2, [7], grant=1))
    await link.until_tokens(1, 2)
    await link.until_load(lambda load: load.running == 2)
    assert len(link.tokens(1)) == 2
    await link.send(grants=shard_pb2.Grants(attempts=[1], counts=[5]), releases=[2])
    assert await link.until_tokens(1, 5) == alone(PROMPT, 5)
    await link.until_load(lambda load: load.running == 1)


async def test_siblings_share_their_prompt(system: System) -> None:
    link = system.link()
    await link.send(
        admit(1, generation_id="g"),
        admit(2, generation_id="g", choice=1, fork_of=1, token_ids=pack_ids([*PROMPT, 9]), max_count=9, grant=9),
    )
    assert await link.until_tokens(2) == alone([*PROMPT, 9], 8)
    assert await link.until_tokens(1) == alone(PROMPT, 8)
    cached = {each.attempt: each.cached_tokens for message in link.messages for each in message.admitted}
    assert cached == {1: 0, 2: len(PROMPT)}


async def test_silence_is_spoken(system: System) -> None:
    link = system.link()
    await link.until(lambda: len(link.messages) == 4)
    assert all(message.HasField("load") and not message.steps for message in link.messages)
    assert link.load.free_blocks == BLOCKS


async def test_the_load_is_told_under_traffic_too(system: System) -> None:
    system.runner.delay = 0.02
    link = system.link()
    begin = time.monotonic()
    await link.send(admit(max_count=30, grant=30))
    await link.until_tokens(1, 30)
    seconds = time.monotonic() - begin
    with_load = [message for message in link.messages if message.steps and message.HasField("load")]
    assert 3 <= len(with_load) <= 2 + seconds / HEARTBEAT
    assert with_load[1].load.running == 1
    assert all(message.load.drawn_tokens >= message.steps[-1].counts[0] for message in with_load)


async def test_a_broken_link_releases_its_admissions_and_harms_no_other(system: System) -> None:
    system.runner.delay = 0.01
    lost, kept = system.link(), system.link()
    await lost.send(admit(1, [7] * 9, max_count=50, grant=50), admit(2, max_count=50, grant=50))
    await kept.send(admit(1, [9], generation_id="kept", max_count=40, grant=40))
    await lost.until_tokens(2, 2)
    await system.channels[0].close()  # as when the process dies
    await kept.until_load(lambda load: load.running == 1)
    assert await kept.until_tokens(1, 40) == alone([9], 40)
    again = system.link()
    await again.send(admit(1, [7] * 9))
    assert await again.until_tokens(1) == alone([7] * 9, 8)
    cached = [each.cached_tokens for message in again.messages for each in message.admitted]
    assert cached == [8], "its blocks stayed as prefix cache"


@pytest.mark.parametrize("end", ["cancel", "done_writing"])
async def test_every_end_of_a_link_releases(system: System, end: str) -> None:
    system.runner.delay = 0.01
    link, watcher = system.link(), system.link()
    await link.send(admit(1, max_count=50, grant=50))
    await link.until_tokens(1, 2)
    if end == "cancel":
        link.call.cancel()
    else:
        await link.call.done_writing()
        while await link.call.read() is not aio.EOF:
            pass
        assert await link.call.code() is grpc.StatusCode.OK
    await watcher.until_load(lambda load: load.running == 0 and load.waiting == 0)


async def test_a_newer_owner_takes_over_from_another_link(system: System) -> None:
    system.runner.delay = 0.01
    old, new = system.link(), system.link()
    await old.send(admit(7, generation_id="g", epoch=5, max_count=40, grant=40))
    known = await old.until_tokens(7, 2)
    await new.send(admit(1, generation_id="g", epoch=6, token_ids=pack_ids([*PROMPT, *known])))
    await old.until(lambda: 7 in old.ended)
    assert isinstance(old.ended[7], OwnerChanged)
    assert [*known, *await new.until_tokens(1, 8 - len(known))] == alone(PROMPT, 8)
    await new.send(admit(2, generation_id="h", epoch=6, max_count=40, grant=40))
    await new.until_tokens(2, 1)
    await old.send(admit(8, generation_id="h", epoch=5))
    await old.until(lambda: 8 in old.ended)
    assert isinstance(old.ended[8], OwnerChanged)


async def test_a_malformed_message_ends_its_link_alone(system: System) -> None:
    system.runner.delay = 0.01
    bad, good = system.link(), system.link()
    await good.send(admit(1, [9], generation_id="good"))
    await bad.send(admit(1), grants=shard_pb2.Grants(attempts=[1, 2], counts=[3]))
    with pytest.raises(aio.AioRpcError) as raised:
        await bad.until(lambda: False)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(rpc.from_call_error(raised.value), InvalidRequest)
    assert await good.until_tokens(1) == alone([9], 8)


async def test_a_link_that_does_not_read_holds_nobody_up_and_loses_nothing(system: System) -> None:
    # With 20 top tokens for each of 8 rows a step is a kilobyte, so that the transport's buffers are soon full.
    rounds, count = 5, 40
    prompts = {attempt: [attempt % 31] for attempt in range(1, rounds * 8 + 1)}
    stuck, watcher = system.narrow_link(), system.link()
    await stuck.send(
        *(admit(attempt, prompt, top_logprobs=20, max_count=count, grant=count) for attempt, prompt in prompts.items())
    )
    await watcher.until_load(lambda load: load.drawn_tokens == rounds * 8 * count)
    steps_done = watcher.load.steps
    await stuck.until(
        lambda: bool(stuck.messages[-1:]) and stuck.steps[-1:] != [] and stuck.steps[-1].number == steps_done
    )
    numbers = [step.number for step in stuck.steps]
    assert numbers == sorted(set(numbers))
    for attempt in (1, rounds * 4, rounds * 8):
        assert stuck.tokens(attempt) == alone(prompts[attempt], count)
    assert sum(len(step.token_ids) for step in stuck.steps) == rounds * 8 * count
    assert max(len(message.steps) for message in stuck.messages) > 1, "several steps in one message"


async def test_draining_asks_everybody_to_leave_and_waits(system: System) -> None:
    busy, idle = system.link(), system.link()
    await busy.send(admit(1, grant=2))
    await busy.until_tokens(1, 2)
    await idle.until(lambda: bool(idle.messages))
    drained = asyncio.create_task(system.service.drain())
    for link in (busy, idle):
        await link.until(lambda link=link: link.messages[-1].draining)  # type: ignore[misc]
    await busy.send(admit(2, [7]))
    await busy.until(lambda: 2 in busy.ended)
    assert isinstance(busy.ended[2], Draining)
    assert not drained.done()
    late = system.link()
    await late.until(lambda: bool(late.messages))
    assert late.messages[0].draining
    await busy.send(releases=[1])
    async with asyncio.timeout(5):
        await drained
        for link in (busy, idle, late):
            while await link.call.read() is not aio.EOF:
                pass
            assert await link.call.code() is grpc.StatusCode.OK
