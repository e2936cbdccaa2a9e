"""Opening and reading in the session store, against a real server (R8, R12-R14, R17)."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.common.errors import (
    FermataError,
    GenerationNotFound,
    LogLost,
    NotYetSupported,
    RequestIdReused,
    SessionBusy,
    SessionChanged,
    SessionNotFound,
    SessionStoreUnavailable,
)
from services.common.types import FinishReason, pack_ids
from services.orchestrator import session_scripts as scripts
from services.orchestrator.session_records import (
    BranchPoint,
    Claimed,
    NewGeneration,
    ResultKind,
    Terminal,
    join_generation_id,
    random_ids,
)
from services.orchestrator.sessions import SessionStore
from tests.unit.orchestrator.store_helpers import TENANT, begin, open_stores
from tests.valkey import start_valkey

BINARY = b"\x00\r\n\xff'\"{}" + bytes(range(256))
CANCELLED = FinishReason.CANCELLED


# --- opening (R8, R12, R14, R17) ---------------------------------------------------------------------------------


async def test_what_is_opened_is_read_back(one: SessionStore, two: SessionStore) -> None:
    before = await one.now_ms()
    run = await begin(
        one,
        prompt_ids=pack_ids([0, 13, 10, 2**32 - 1]),
        messages=BINARY,
        spec=BINARY[::-1],
        choices=2,
        position=4,
        request_hash=BINARY[:32],
        detached=True,
        deadline_ms=before + 60_000,
        labels={"ключ": "\x00{value}"},
    )
    meta = await run.seen_by(two).meta()
    assert (meta.state, meta.owner, meta.address, meta.epoch) == ("running", "one", "one:1", run.epoch)
    assert meta.generations == [run.generation] and meta.active == run.generation
    assert meta.labels == {"ключ": "\x00{value}"}
    assert before <= meta.created_ms <= run.epoch and meta.expires_ms == meta.created_ms + 3_600_000
    record = await run.seen_by(two).record()
    assert record.parent == BranchPoint() and record.prompt_ids == [0, 13, 10, 2**32 - 1]
    assert (record.messages, record.spec, record.request_hash) == (BINARY, BINARY[::-1], BINARY[:32])
    assert (record.choices, record.position, record.detached) == (2, 4, True)
    assert record.created_ms == meta.created_ms and record.deadline_ms == before + 60_000
    assert record.logs == [[], []] and record.terminals == {} and not record.finished
    assert record.cached_tokens is None


async def test_a_retried_open_finds_its_own(one: SessionStore, two: SessionStore) -> None:
    session, generation = await one.ids_for(TENANT, "request", "")
    assert (session, generation) == await two.ids_for(TENANT, "request", "")
    new = NewGeneration(tenant=TENANT, session=session, generation=generation, new_session=True, request_hash=b"\x01")
    first = await one.open(new)
    again = await two.open(new)
    assert first.created and not again.created
    assert (again.epoch, again.owner, again.address) == (first.epoch, "one", "one:1")
    other = NewGeneration(tenant=TENANT, session=session, generation=generation, new_session=True, request_hash=b"\x02")
    with pytest.raises(RequestIdReused) as raised:
        await two.open(other)
    assert raised.value.metadata == {"generation_id": join_generation_id(session, generation)}


async def test_a_new_session_never_takes_an_existing_one(one: SessionStore) -> None:
    run = await begin(one)
    with pytest.raises(RequestIdReused):
        await one.open(NewGeneration(tenant=TENANT, session=run.session, generation="0" * 16, new_session=True))


async def test_a_running_session_is_busy(one: SessionStore, two: SessionStore) -> None:
    run = await begin(one)
    with pytest.raises(SessionBusy) as raised:
        await begin(two, run.session, expected_generation_count=0)
    assert raised.value.metadata == {"generation_id": join_generation_id(run.session, run.generation)}
    assert (await run.append(0, [1])).kind is ResultKind.OK


async def test_a_parked_generation_is_cancelled_where_its_log_ends(
    one: SessionStore, two: SessionStore, raw: Redis
) -> None:
    run = await begin(one, choices=3, position=7, detached=True)
    await run.append(0, [5, 6, 7])
    await run.append(0, [8], choice=1)
    await run.finish(1, FinishReason.STOP_TOKEN, choice=1)
    assert (await run.park()).kind is ResultKind.OK
    assert (await run.meta()).state == "parked"
    with pytest.raises(SessionChanged):
        await begin(two, run.session, expected_generation_count=2)
    assert (await run.record()).terminals.keys() == {1}, "a refused opening cancels nothing"

    following = await begin(two, run.session, parent=BranchPoint(run.generation, 0, 2), expected_generation_count=1)
    record = await run.record()
    assert record.terminals == {
        0: Terminal(0, CANCELLED, 3, prompt_tokens=7),
        1: Terminal(1, FinishReason.STOP_TOKEN, 1),
        2: Terminal(2, CANCELLED, 0, prompt_tokens=7),
    }
    assert record.finished and record.logs == [[5, 6, 7], [8], []]
    assert await raw.hlen("f:detached") == 0, "what is finished needs nobody"
    meta = await following.meta()
    assert meta.state == "running" and meta.generations == [run.generation, following.generation]
    assert following.epoch > run.epoch
    fenced = await run.append(3, [9])
    assert (fenced.kind, fenced.epoch, fenced.owner) == (ResultKind.FENCED, following.epoch, "two")
    assert (await following.record()).parent == BranchPoint(run.generation, 0, 2)


async def test_the_cancelled_terminal_of_the_script_is_the_owners(one: SessionStore) -> None:
    """Equal endings have equal bytes, whoever writes them."""
    run = await begin(one, position=7)
    await run.append(0, [5])
    await run.park()
    await begin(one, run.session)
    same = await run.write(run.finish_with(Terminal(0, CANCELLED, 1, prompt_tokens=7)))
    assert same.kind is ResultKind.DUPLICATE


async def test_a_session_that_changed_is_not_continued(one: SessionStore, raw: Redis) -> None:
    run = await begin(one)
    await run.append(0, [1, 2])
    await run.finish(2)
    with pytest.raises(SessionChanged):
        await begin(one, run.session, expected_generation_count=2)
    with pytest.raises(SessionChanged):
        await begin(one, run.session, parent=BranchPoint(run.generation, 0, 3))
    for parent in (BranchPoint("f" * 16, 0, 0), BranchPoint(run.generation, 1, 0)):
        with pytest.raises(GenerationNotFound):
            await begin(one, run.session, parent=parent)
    assert (await run.meta()).generations == [run.generation]
    await begin(one, run.session, parent=BranchPoint(run.generation, 0, 2), expected_generation_count=1)


async def test_unknown_and_impossible_ids(one: SessionStore) -> None:
    session, generation = random_ids()
    run = await begin(one)
    for missing in (session, "x}:m", "A" * 26, ""):
        with pytest.raises(SessionNotFound):
            await one.load_session(TENANT, missing)
        with pytest.raises(SessionNotFound):
            new = NewGeneration(tenant=TENANT, session=missing, generation=generation, new_session=False)
            await one.open(new)
    for absent in (generation, "0" * 15, "../" + "0" * 13):
        with pytest.raises(GenerationNotFound):
            await one.load_generations(TENANT, run.session, [absent])
        with pytest.raises(GenerationNotFound):
            await one.claim(TENANT, run.session, absent, expected_owner="one")
    with pytest.raises(SessionNotFound):
        await one.load_session("another tenant", run.session)
    with pytest.raises(GenerationNotFound):
        await one.claim("another tenant", run.session, run.generation, expected_owner="one")


@pytest.mark.parametrize("tenant", ["a:b", "a}b", "{", "", "тенант", "a b\r\n\x00*?"])
async def test_any_tenant_has_its_own_sessions(one: SessionStore, tenant: str) -> None:
    run = await begin(one, tenant=tenant, detached=True)
    assert (await run.append(0, [1])).stored
    assert [record.session for record in (await one.list_sessions(tenant, 10, ""))[0]] == [run.session]
    assert (tenant, run.session, run.generation, "one") in await one.orphans()
    await run.finish(1)


async def test_ids(one: SessionStore) -> None:
    session, generation = await one.ids_for(TENANT, "r", "")
    assert len(session) == 26 and len(generation) == 16
    assert await one.ids_for(TENANT, "r", "given") == ("given", generation)
    others = {await one.ids_for(*names, "") for names in (("t", "enantr"), ("tenant2", "r"), (TENANT, "r2"))}
    assert len(others) == 3 and (session, generation) not in others
    assert await one.ids_for(TENANT, "", "") != await one.ids_for(TENANT, "", "")
    assert (await one.ids_for(TENANT, "", "given"))[0] == "given"


async def test_the_secret_survives_an_emptied_store_and_a_new_one_is_taken_over(tmp_path: Path) -> None:
    server = start_valkey(tmp_path)
    try:
        async with open_stores(server.url, "one", "two") as (one, two), Redis.from_url(server.url) as raw:
            ids = await one.ids_for(TENANT, "r", "")
            await raw.flushall()
            await begin(two)
            async with open_stores(server.url, "three") as (three,):
                assert await three.ids_for(TENANT, "r", "") == ids, "the first opening put the secret back"
            await raw.set("f:secret", bytes(32))
            with pytest.raises(SessionStoreUnavailable):
                await begin(one)
            await begin(one)
            assert await one.ids_for(TENANT, "r", "") != ids
    finally:
        server.stop()


# --- reading -----------------------------------------------------------------------------------------------------


async def test_many_generations_are_read_in_the_order_asked_for(one: SessionStore) -> None:
    run = await begin(one)
    await run.append(0, [0])
    await run.finish(1)
    generations = [run.generation]
    for number in range(1, 40):
        run = await begin(one, run.session, parent=BranchPoint(generations[-1], 0, 1))
        await one.write([run.append_at(0, [number]), run.finish_with(Terminal(0, CANCELLED, 1))])
        generations.append(run.generation)
    assert (await run.meta()).generations == generations
    records = await one.load_generations(TENANT, run.session, generations[::-1])
    assert [record.generation for record in records] == generations[::-1]
    assert [record.logs for record in records] == [[[number]] for number in range(39, -1, -1)]


@pytest.mark.parametrize("suffix", ["", ":p", ":c0", ":c1"])
async def test_a_missing_part_is_a_loss(one: SessionStore, raw: Redis, suffix: str) -> None:
    run = await begin(one, choices=2)
    await raw.delete(run.record_key + suffix)
    with pytest.raises(LogLost) as raised:
        await run.record()
    assert raised.value.metadata == {"session_id": run.session}


@pytest.mark.parametrize("log", [b"", b"\1\0\0\0", b"\1\0\0\0\2\0"])
async def test_a_short_log_is_a_loss(one: SessionStore, raw: Redis, log: bytes) -> None:
    run = await begin(one)
    await run.append(0, [1, 2])
    await run.finish(2)
    await raw.set(run.record_key + ":c0", log)
    with pytest.raises(LogLost):
        await run.record()


async def test_records_of_another_version_are_refused(one: SessionStore, raw: Redis) -> None:
    tenant = "versions"
    run, other = await begin(one, tenant=tenant), await begin(one, tenant=tenant)
    await raw.hset(run.key("m"), "v", "2")
    for call in (
        run.meta(),
        run.record(),
        begin(one, run.session, tenant=tenant),
        one.claim(tenant, run.session, run.generation, expected_owner="one"),
    ):
        with pytest.raises(NotYetSupported):
            await call
    assert [record.session for record in (await one.list_sessions(tenant, 10, ""))[0]] == [other.session]


# --- what the server says ----------------------------------------------------------------------------------------


async def test_scripts_are_taught_again(one: SessionStore, raw: Redis) -> None:
    run = await begin(one)
    await raw.script_flush()
    assert (await run.append(0, [1])).kind is ResultKind.OK
    await raw.script_flush()
    assert isinstance(await one.claim(TENANT, run.session, run.generation, expected_owner="one"), Claimed)
    await raw.script_flush()
    assert (await run.record()).logs == [[1]]
    assert await raw.script_exists(scripts.LOAD.digest) == [True]


async def test_errors_of_scripts_repeat_nothing_that_a_user_wrote(
    one: SessionStore, raw: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    run = await begin(one, messages=b"MARK", labels={"MARK": "MARK"})
    await raw.delete(run.record_key)
    await raw.set(run.record_key, b"MARK")
    with pytest.raises(FermataError) as raised:
        await run.append(0, [1])
    assert raised.value.status == "INTERNAL" and "MARK" not in raised.value.message
    assert "WRONGTYPE" in caplog.text and "MARK" not in caplog.text


async def test_the_clock_is_the_stores(one: SessionStore, raw: Redis) -> None:
    seconds, _ = await raw.time()
    assert abs(await one.now_ms() - seconds * 1000) < 5000
