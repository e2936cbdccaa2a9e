"""The orchestrator's calls over real gRPC, a real Valkey and fake shards: owning, reading, parking, taking over."""

from __future__ import annotations

import asyncio

import pytest

from fermata.running_hash import hash_ids
from fermata.v1 import common_pb2, generation_pb2
from services.common.errors import (
    RequestIdReused,
)
from services.orchestrator.v1 import orchestrator_pb2 as pb
from tests.unit.orchestrator.fake_shard import expected_output
from tests.unit.orchestrator.house import EXPECTED, House, cursor, failure, open_generation, read_all
from tests.unit.orchestrator.system import (
    CONTEXT,
    SEED,
    Reading,
    open_request,
)


async def test_a_generation_is_read_whole_and_stays_readable(house: House) -> None:
    orchestrator = await house.orchestrator()
    name = await open_generation(orchestrator, session_id="")
    reading = await read_all(orchestrator, name)
    assert reading.ids[0] == EXPECTED[:20]
    assert reading.hashes[0] == hash_ids(EXPECTED[:20])
    terminal = reading.terminals[0]
    assert (terminal.finish_reason, terminal.count) == (common_pb2.FINISH_REASON_MAX_TOKENS, 20)
    opened = reading.attached[0].opened
    assert (opened.generation_id, opened.prompt_tokens) == (name.generation_id, len(CONTEXT))
    assert (opened.spec.sampling.seed, opened.fingerprint.weights) == (SEED, "w")
    again = await read_all(orchestrator, name)
    assert again.ids[0] == EXPECTED[:20]
    log = await orchestrator.stub.GetGeneration(pb.GetGenerationRequest(name=name))
    assert log.state == generation_pb2.GENERATION_STATE_FINISHED
    assert orchestrator.service.owner.generations == {}  # nothing is kept in memory for it


async def test_a_reader_begins_at_its_cursor(house: House) -> None:
    orchestrator = await house.orchestrator()
    name = await open_generation(orchestrator)
    await (await Reading(orchestrator, name).start()).until(7)
    reading = await (await Reading(orchestrator, name).start([cursor(7, EXPECTED)])).until()
    assert reading.ids[0][7:] == EXPECTED[7:20]
    assert reading.attached[0].choices[0].count == 7


async def test_choices_share_one_admission_of_the_prompt(house: House) -> None:
    orchestrator = await house.orchestrator()
    name = await open_generation(orchestrator, n=3)
    reading = await read_all(orchestrator, name, choices=3)
    for choice in range(3):
        assert reading.ids[choice] == expected_output(CONTEXT, SEED, 20, choice)
    leader, *others = house.shard.admits
    assert [admit.fork_of for admit in others] == [leader.attempt] * 2


async def test_a_retry_finds_its_own_and_another_body_is_refused(house: House) -> None:
    orchestrator = await house.orchestrator()
    first = await orchestrator.stub.Open(open_request(request_id="r1"))
    second = await orchestrator.stub.Open(open_request(request_id="r1"))
    assert (first.created, second.created) == (True, False)
    assert first.generation_id == second.generation_id
    by_request = await read_all(orchestrator, pb.Name(tenant="default", request_id="r1"))
    assert by_request.ids[0] == EXPECTED[:20]
    assert isinstance(
        await failure(orchestrator.stub.Open(open_request(request_id="r1", request_hash=b"other"))), RequestIdReused
    )


async def test_a_stop_string_ends_the_log_at_its_token_and_frees_the_shard(house: House) -> None:
    house.shard.pace = 0.002
    orchestrator = await house.orchestrator()
    name = await open_generation(orchestrator, max_tokens=100, strings=[chr(ord("a") + (EXPECTED[30] - 1) % 26)])
    reading = await read_all(orchestrator, name)
    assert reading.terminals[0].finish_reason == common_pb2.FINISH_REASON_STOP_STRING
    assert reading.ids[0] == EXPECTED[: len(reading.ids[0])]
    await asyncio.sleep(0.1)
    assert house.shard.admitted == {}


async def test_grants_bound_what_is_computed_ahead_without_a_reader(house: House) -> None:
    orchestrator = await house.orchestrator(park_after=60.0)
    name = await open_generation(orchestrator, max_tokens=200)
    await asyncio.sleep(0.3)
    (running,) = house.shard.admitted.values()
    assert running.count == 32  # the first grant, and no more (R6, R11)
    reading = await read_all(orchestrator, name)
    assert reading.ids[0] == EXPECTED[:200]


async def test_one_message_renews_the_grants_of_all_who_run_together(house: House) -> None:
    house.shard.pace = 0.005
    orchestrator = await house.orchestrator()
    first = await Reading(orchestrator, await open_generation(orchestrator, max_tokens=200)).start()
    await first.until(5)  # the second one's half comes at another step
    second = await Reading(orchestrator, await open_generation(orchestrator, max_tokens=200)).start()
    await asyncio.gather(first.until(), second.until())
    together = [attempts for attempts in house.shard.grants if len(attempts) == 2]
    assert len(together) >= 8
    assert len(house.shard.grants) <= 16  # 24 when each comes by itself


async def test_what_comes_after_silence_is_stored_at_once_and_the_rest_in_groups(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.orchestrator.log_writer.APPEND_INTERVAL", 60.0)
    house.shard.pace = 0.1
    orchestrator = await house.orchestrator()
    reading = await Reading(orchestrator, await open_generation(orchestrator, max_tokens=20)).start()
    reader = asyncio.create_task(reading.until())
    stored = []
    while not reader.done():
        stored.append((await orchestrator.stub.Identify(pb.IdentifyRequest())).stored_tokens)
        await asyncio.sleep(0.005)
    assert [count for count in (1, 9, 17) if count in stored] == [1, 9, 17]  # then whenever 8 of them wait (R15)


async def test_an_unread_generation_is_parked_and_goes_on_with_the_next_reader(house: House) -> None:
    house.shard.pace = 0.005
    orchestrator = await house.orchestrator(park_after=0.2)
    name = await open_generation(orchestrator, max_tokens=200)
    first = await (await Reading(orchestrator, name).start()).until(10)
    first.leave()
    await asyncio.sleep(0.6)
    assert house.shard.admitted == {}
    log = await orchestrator.stub.GetGeneration(pb.GetGenerationRequest(name=name))
    assert log.state == generation_pb2.GENERATION_STATE_PARKED
    second = await (await Reading(orchestrator, name).start([cursor(10, EXPECTED)])).until()
    assert second.ids[0][10:] == EXPECTED[10:200]


async def test_a_detached_generation_goes_on_alone(house: House) -> None:
    orchestrator = await house.orchestrator(park_after=0.1)
    name = await open_generation(orchestrator, max_tokens=200, detach=True)
    for _ in range(100):
        log = await orchestrator.stub.GetGeneration(pb.GetGenerationRequest(name=name))
        if log.state == generation_pb2.GENERATION_STATE_FINISHED:
            break
        await asyncio.sleep(0.05)
    assert log.state == generation_pb2.GENERATION_STATE_FINISHED
