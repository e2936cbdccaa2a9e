"""Owners, shards and stores that go away, over real gRPC, a real Valkey and fake shards; and the order of readers."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from fermata.v1 import common_pb2, generation_pb2
from services.common import rpc
from services.common.errors import (
    CursorOutOfRange,
    Draining,
    GenerationNotFound,
    InvalidLogits,
    LogDiverged,
    NeedFrom,
    OwnerElsewhere,
    SessionBusy,
    SessionStoreUnavailable,
)
from services.orchestrator.readers import UNACKNOWLEDGED_LIMIT
from services.orchestrator.v1 import orchestrator_pb2 as pb
from tests.unit.orchestrator.fake_shard import FakeShard, expected_output
from tests.unit.orchestrator.house import EXPECTED, House, cursor, failure, open_generation, read_all
from tests.unit.orchestrator.system import (
    CONTEXT,
    SEED,
    Reading,
    open_request,
)


@pytest.mark.parametrize("durability", [common_pb2.DURABILITY_ASYNC, common_pb2.DURABILITY_COMMITTED])
async def test_a_dropped_owner_is_replaced_with_the_same_tokens(house: House, durability: int) -> None:
    house.shard.pace = 0.002
    first = await house.orchestrator()
    second = await house.orchestrator()
    name = await open_generation(first, max_tokens=200, durability=durability)
    reading = await (await Reading(first, name).start()).until(50)
    had = reading.ids[0]
    if durability == common_pb2.DURABILITY_COMMITTED:
        assert reading.durable[0] >= len(had)
    await house.starter.drop(first)
    other = await (await Reading(second, name).start([cursor(len(had), had)])).until()
    if isinstance(other.error, NeedFrom):
        lost = int(other.error.metadata["count"])
        assert durability == common_pb2.DURABILITY_ASYNC
        assert lost < len(had)
        tail = common_pb2.Tail(choice=0, first_offset=lost, token_ids=had[lost:])
        other = await (await Reading(second, name).start([cursor(len(had), had)], [tail])).until()
    assert had + other.ids[0][len(had) :] == EXPECTED[:200]
    log = await second.stub.GetGeneration(pb.GetGenerationRequest(name=name))
    assert len(log.output_token_ids[0]) == 4 * 200


async def test_a_living_owner_is_named(house: House) -> None:
    house.shard.pace = 0.01
    first, second = await house.orchestrator(), await house.orchestrator()
    name = await open_generation(first, max_tokens=200)
    reading = await (await Reading(first, name).start()).until(5)
    other = await (await Reading(second, name).start()).until()
    assert isinstance(other.error, OwnerElsewhere)
    assert other.error.metadata["address"] == first.address
    reading.leave()


async def test_cursors_that_do_not_fit_are_refused(house: House) -> None:
    house.shard.pace = 0.01
    orchestrator = await house.orchestrator()
    name = await open_generation(orchestrator, max_tokens=100)
    ahead = await (await Reading(orchestrator, name).start([cursor(90, EXPECTED)])).until()
    assert isinstance(ahead.error, NeedFrom)
    wrong = await (await Reading(orchestrator, name).start()).until(5)
    wrong.leave()
    other = [token + 1 for token in EXPECTED]
    diverged = await (await Reading(orchestrator, name).start([cursor(3, other)])).until()
    assert isinstance(diverged.error, LogDiverged)
    await orchestrator.stub.Cancel(pb.CancelRequest(name=name))
    beyond = await (await Reading(orchestrator, name).start([cursor(99, EXPECTED)])).until()
    assert isinstance(beyond.error, CursorOutOfRange)
    unknown = pb.Name(tenant="default", generation_id="nothing")
    assert isinstance((await (await Reading(orchestrator, unknown).start()).until()).error, GenerationNotFound)


async def test_cancel_ends_for_all_readers_and_again_is_no_error(house: House) -> None:
    house.shard.pace = 0.005
    orchestrator = await house.orchestrator()
    name = await open_generation(orchestrator, max_tokens=300)
    readings = [await (await Reading(orchestrator, name).start()).until(5) for _ in range(2)]
    answers = [await orchestrator.stub.Cancel(pb.CancelRequest(name=name)) for _ in range(2)]
    for reading in readings:
        await reading.until()
        assert reading.terminals[0].finish_reason == common_pb2.FINISH_REASON_CANCELLED
        assert reading.terminals[0].count == len(reading.ids[0]) == answers[0].terminals[0].count
    assert answers[0] == answers[1]
    await asyncio.sleep(0.05)
    assert house.shard.admitted == {}


async def test_a_time_limit_ends_it(house: House) -> None:
    house.shard.pace = 0.02
    orchestrator = await house.orchestrator()
    name = await open_generation(orchestrator, max_tokens=300, time_limit_ms=300)
    reading = await read_all(orchestrator, name)
    assert reading.terminals[0].finish_reason == common_pb2.FINISH_REASON_TIME_LIMIT
    assert 3 < len(reading.ids[0]) < 40


async def test_one_running_generation_per_session(house: House) -> None:
    house.shard.pace = 0.01
    orchestrator = await house.orchestrator(park_after=0.2)
    opened = await orchestrator.stub.Open(open_request(max_tokens=200))
    name = pb.Name(tenant="default", generation_id=opened.generation_id)
    reading = await (await Reading(orchestrator, name).start()).until(5)
    parent = pb.Branch(generation_id=opened.generation_id, choice=0, count=5)
    request = open_request(max_tokens=5, session_id=opened.session_id)
    request.parent.CopyFrom(parent)
    busy = await failure(orchestrator.stub.Open(request))
    assert isinstance(busy, SessionBusy)
    assert busy.metadata["generation_id"] == opened.generation_id
    reading.leave()
    await asyncio.sleep(0.7)  # parked: now the new one ends it
    after = await orchestrator.stub.Open(request)
    context = CONTEXT + EXPECTED[:5] + CONTEXT
    second = await read_all(orchestrator, pb.Name(tenant="default", generation_id=after.generation_id))
    assert second.ids[0] == expected_output(context, SEED, 5)
    ended = await read_all(orchestrator, name)
    assert ended.terminals[0].finish_reason == common_pb2.FINISH_REASON_CANCELLED
    turns = (
        await orchestrator.stub.OpenSession(pb.OpenSessionRequest(tenant="default", session_id=opened.session_id))
    ).turns
    assert [turn.generation_id for turn in turns] == [opened.generation_id, after.generation_id]
    session = (
        await orchestrator.stub.GetSession(pb.GetSessionRequest(tenant="default", session_id=opened.session_id))
    ).session
    assert [item.parent_count for item in session.generations] == [0, 5]


async def test_a_session_whose_owner_died_is_freed_by_the_next_request(house: House) -> None:
    house.shard.pace = 0.01
    first, second = await house.orchestrator(), await house.orchestrator()
    opened = await first.stub.Open(open_request(max_tokens=200))
    await house.starter.drop(first)
    request = open_request(max_tokens=5, session_id=opened.session_id)
    after = await second.stub.Open(request)
    assert after.created


async def test_a_broken_link_is_healed_below_the_reader(house: House) -> None:
    house.shard.pace = 0.002
    orchestrator = await house.orchestrator()
    name = await open_generation(orchestrator, max_tokens=200)
    reading = await (await Reading(orchestrator, name).start()).until(30)
    port = int(house.shard.address.rpartition(":")[2])
    await house.shard.drop()
    await asyncio.sleep(0.2)
    await house.shard.start(port)
    await reading.until()
    assert reading.ids[0] == EXPECTED[:200]
    assert len(reading.attached) == 1


async def test_another_shard_takes_over_and_another_fingerprint_is_announced(house: House) -> None:
    spare = FakeShard(pace=0.002, weights="other")
    await spare.start()
    house.shard.pace = 0.002
    orchestrator = await house.orchestrator(spare)
    names = [await open_generation(orchestrator, max_tokens=200, exact=exact) for exact in (False, True)]
    begun = [await (await Reading(orchestrator, name).start()).until(30) for name in names]
    ours = begun[0].attached[0].opened.fingerprint.weights
    await (house.shard if ours == "w" else spare).drop()
    await begun[0].until()
    assert begun[0].ids[0] == EXPECTED[:200]
    assert [item.opened.fingerprint.weights for item in begun[0].attached] == (
        ["w", "other"] if ours == "w" else ["other", "w"]
    )
    await (spare if ours == "w" else house.shard).drop()


async def test_a_sequence_that_fails_ends_alone(house: House) -> None:
    house.shard.fail_at = (5, InvalidLogits("not a number"))
    orchestrator = await house.orchestrator()
    reading = await read_all(orchestrator, await open_generation(orchestrator))
    terminal = reading.terminals[0]
    assert (terminal.finish_reason, terminal.count) == (common_pb2.FINISH_REASON_ERROR, 5)
    assert isinstance(rpc.from_status(terminal.error), InvalidLogits)


async def test_an_admission_that_meets_a_draining_shard_goes_elsewhere(house: House) -> None:
    """It is on its way when the shard says that it leaves, so the shard refuses it."""
    spare = FakeShard()
    await spare.start()
    house.shard.fail_at = (0, Draining("this shard is about to leave"))
    orchestrator = await house.orchestrator(spare)
    while not house.shard.admits:  # a session prefers one of both by its name
        reading = await read_all(orchestrator, await open_generation(orchestrator, n=3))
        reasons = [terminal.finish_reason for terminal in reading.terminals.values()]
        assert reasons == [common_pb2.FINISH_REASON_MAX_TOKENS] * 3
        assert reading.ids[0] == EXPECTED[: len(reading.ids[0])]
    await spare.drop()


async def test_a_silent_shard_is_left(house: House) -> None:
    house.shard.pace = 0.01
    orchestrator = await house.orchestrator()
    name = await open_generation(orchestrator, max_tokens=100)
    reading = await (await Reading(orchestrator, name).start()).until(10)
    house.shard.silent = True
    await asyncio.sleep(3.5)
    house.shard.silent = False
    await reading.until()
    assert reading.ids[0] == EXPECTED[:100]


async def test_without_a_store_nothing_is_opened_and_what_runs_goes_on(house: House) -> None:
    house.shard.pace = 0.01
    orchestrator = await house.orchestrator()
    name = await open_generation(orchestrator, max_tokens=150)
    reading = await (await Reading(orchestrator, name).start()).until(10)
    house.valkey.kill()
    assert isinstance(await failure(orchestrator.stub.Open(open_request())), SessionStoreUnavailable)
    await reading.until()
    assert reading.ids[0] == EXPECTED[:150]
    assert reading.durable[0] < 150
    house.valkey.restart()
    for _ in range(60):
        log = await orchestrator.stub.GetGeneration(pb.GetGenerationRequest(name=name))
        if log.state == generation_pb2.GENERATION_STATE_FINISHED:
            break
        await asyncio.sleep(0.1)
    assert len(log.output_token_ids[0]) == 4 * 150


async def test_a_store_that_lost_everything_is_written_again(house: House) -> None:
    house.shard.pace = 0.01
    orchestrator = await house.orchestrator()
    name = await open_generation(orchestrator, max_tokens=150)
    reading = await (await Reading(orchestrator, name).start()).until(10)
    async with Redis.from_url(house.valkey.url) as client:
        await client.flushall()
    await reading.until()
    assert reading.ids[0] == EXPECTED[:150]
    log = await orchestrator.stub.GetGeneration(pb.GetGenerationRequest(name=name))
    assert len(log.output_token_ids[0]) == 4 * 150


async def test_a_store_that_went_back_to_an_earlier_owner_is_claimed_again(house: House) -> None:
    house.shard.pace = 0.01
    orchestrator = await house.orchestrator()
    name = await open_generation(orchestrator, max_tokens=150)
    reading = await (await Reading(orchestrator, name).start()).until(10)
    session = name.generation_id.partition(".")[0]
    async with Redis.from_url(house.valkey.url) as client:
        await client.hset(f"f:{{default:{session}}}:m", mapping={"owner": "somebody before", "epoch": "1"})  # type: ignore[misc]
    await reading.until()
    assert reading.ids[0] == EXPECTED[:150]
    assert reading.error is None


async def test_a_later_owner_ends_the_earlier_one_at_once(house: House) -> None:
    house.shard.pace = 0.01
    orchestrator = await house.orchestrator()
    name = await open_generation(orchestrator, max_tokens=400)
    reading = await (await Reading(orchestrator, name).start()).until(10)
    session = name.generation_id.partition(".")[0]
    async with Redis.from_url(house.valkey.url) as client:
        await client.hset(f"f:{{default:{session}}}:m", mapping={"owner": "x", "epoch": str(2**52)})  # type: ignore[misc]
    await reading.until()
    assert reading.error is not None
    assert reading.error.reason == "OWNER_CHANGED"
    await asyncio.sleep(0.1)
    assert house.shard.admitted == {}


async def test_a_detached_orphan_is_adopted(house: House) -> None:
    house.shard.pace = 0.01
    first, second = await house.orchestrator(), await house.orchestrator()
    name = await open_generation(first, max_tokens=100, detach=True)
    await asyncio.sleep(0.2)
    await house.starter.drop(first)
    for _ in range(120):
        log = await second.stub.GetGeneration(pb.GetGenerationRequest(name=name))
        if log.state == generation_pb2.GENERATION_STATE_FINISHED:
            break
        await asyncio.sleep(0.1)
    assert log.state == generation_pb2.GENERATION_STATE_FINISHED
    assert len(log.output_token_ids[0]) == 4 * 100


async def test_drain_hands_over_without_waiting_for_anybody_to_die(house: House) -> None:
    house.shard.pace = 0.01
    first, second = await house.orchestrator(), await house.orchestrator()
    name = await open_generation(first, max_tokens=100)
    reading = await (await Reading(first, name).start()).until(10)
    await first.service.drain()
    await reading.until()
    assert reading.error is not None
    assert reading.error.reason == "DRAINING"
    had = reading.ids[0]
    other = await (await Reading(second, name).start([cursor(len(had), had)])).until()
    assert had + other.ids[0][len(had) :] == EXPECTED[:100]


async def test_silence_is_spoken(house: House) -> None:
    orchestrator = await house.orchestrator()
    house.shard.silent = True
    name = await open_generation(orchestrator)
    reading = await Reading(orchestrator, name).start()
    loop = asyncio.get_running_loop()
    began = loop.time()
    for _ in range(3):
        assert isinstance(await reading.call.read(), pb.ReadResponse)
    assert 1.0 < loop.time() - began < 3.0
    reading.leave()


async def test_messages_grow_when_they_are_not_acknowledged(house: House) -> None:
    orchestrator = await house.orchestrator(window=400)
    name = await open_generation(orchestrator, max_tokens=400)
    house.shard.pace = 0.004  # slow enough for a message each
    reading = Reading(orchestrator, name, acknowledges=False)
    await reading.start()
    for _ in range(UNACKNOWLEDGED_LIMIT):
        await reading.read_message()
    await asyncio.sleep(0.5)  # some hundred tokens that no message brings
    reading.acknowledges = True
    await reading.call.write(pb.ReadRequest(acknowledged=reading.responses[-1].sequence))
    await reading.until()
    assert reading.ids[0] == EXPECTED[:400]
    lengths = [len(response.tokens.token_ids) for response in reading.responses]
    assert max(lengths[:UNACKNOWLEDGED_LIMIT]) <= 20 < lengths[UNACKNOWLEDGED_LIMIT]


async def test_no_store_call_is_made_per_token(house: House) -> None:
    house.shard.pace = 0.001
    orchestrator = await house.orchestrator()
    names = [await open_generation(orchestrator, max_tokens=200) for _ in range(8)]
    await asyncio.gather(*(read_all(orchestrator, name) for name in names))
    facts = await orchestrator.stub.Identify(pb.IdentifyRequest())
    assert facts.stored_tokens == 8 * 200
    assert facts.store_flushes < facts.stored_tokens / 8
