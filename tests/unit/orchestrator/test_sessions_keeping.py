"""How long and how compactly the session store keeps, and how it is listed (R9, R13)."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from services.common.errors import InvalidRequest, SessionNotFound
from services.common.types import pack_ids
from services.orchestrator.session_encoding import encode_page_token
from services.orchestrator.session_records import BranchPoint, Claimed, ResultKind
from services.orchestrator.sessions import LEASE_SECONDS, SessionStore
from tests.unit.orchestrator.store_helpers import TENANT, Run, begin, open_stores
from tests.valkey import Valkey

HOUR_MS = 3_600_000


async def keys_of(raw: Redis, run: Run) -> list[str]:
    return sorted([key.decode() async for key in raw.scan_iter(run.key("*").replace("{", "?").replace("}", "?"))])


async def expiries(raw: Redis, run: Run) -> set[int]:
    """The moments at which the session's keys expire, its own idea of it included."""
    keys = await keys_of(raw, run)
    assert keys
    fields = await raw.hget(run.key("m"), "expires")
    return {int(fields or 0)} | {await raw.pexpiretime(key) for key in keys}


async def set_expiry(raw: Redis, run: Run, at: int) -> None:
    """As if time had passed."""
    for key in await keys_of(raw, run):
        await raw.pexpireat(key, at)
    await raw.hset(run.key("m"), "expires", str(at))


async def two_generations(one: SessionStore) -> Run:
    run = await begin(one)
    await run.append(0, [1])
    await run.finish(1)
    return await begin(one, run.session, parent=BranchPoint(run.generation, 0, 1), choices=2)


async def test_all_keys_of_a_session_expire_together(one: SessionStore, raw: Redis) -> None:
    run = await two_generations(one)
    keys = await keys_of(raw, run)
    assert len(keys) == 1 + 3 + 4, "meta; record, prompt and log; record, prompt and two logs"
    assert await expiries(raw, run) == {(await run.meta()).created_ms + HOUR_MS}
    await run.append(0, [1], choice=1)
    assert len(await expiries(raw, run)) == 1


@pytest.mark.parametrize("use", ["append", "finish", "park", "claim", "open"])
async def test_use_moves_the_expiry_but_seldom(one: SessionStore, raw: Redis, use: str) -> None:
    async def used(run: Run) -> None:
        if use == "append":
            assert (await run.append(0, [1])).stored
        elif use == "finish":
            assert (await run.finish(0)).stored
        elif use == "park":
            assert (await run.park()).stored
        elif use == "claim":
            assert isinstance(await one.claim(TENANT, run.session, run.generation, expected_owner="one"), Claimed)
        else:
            await run.park()
            await set_expiry(raw, run, at)
            await begin(one, run.session)

    run = await two_generations(one)
    at = await one.now_ms() + HOUR_MS - 20_000
    await set_expiry(raw, run, at)
    await used(run)
    assert await expiries(raw, run) == {at}, "not again within 30 seconds"

    run = await two_generations(one)
    at = await one.now_ms() + HOUR_MS - 30_100
    await set_expiry(raw, run, at)
    before = await one.now_ms()
    await used(run)
    (moved,) = await expiries(raw, run)
    assert before + HOUR_MS <= moved <= await one.now_ms() + HOUR_MS
    assert (await run.meta()).expires_ms == moved


async def test_a_log_that_is_written_again_expires_with_its_session(one: SessionStore, raw: Redis) -> None:
    run = await begin(one)
    await run.append(0, [1, 2])
    await raw.delete(run.record_key + ":c0")
    assert (await run.append(2, [3])).count == 0
    assert (await run.append(0, [1, 2, 3])).kind is ResultKind.OK
    assert len(await expiries(raw, run)) == 1


async def test_an_expired_session_is_gone(valkey: Valkey) -> None:
    async with open_stores(valkey.url, "one", ttl=0.6) as (one,):
        run, other = await begin(one, detached=True), await begin(one)
        for _ in range(4):
            await asyncio.sleep(0.25)
            assert (await run.append(0, [7])).stored, "use keeps it"
        assert [record.session for record in (await one.list_sessions(TENANT, 10, ""))[0]] == [run.session]
        with pytest.raises(SessionNotFound):
            await other.meta()
        await asyncio.sleep(0.8)
        for result in (await run.append(0, [7]), await run.finish(1), await run.park()):
            assert result.kind is ResultKind.MISSING
        assert await one.list_sessions(TENANT, 10, "") == ([], "")
        assert await one.orphans() == []
        with pytest.raises(SessionNotFound):
            await begin(one, run.session)
        async with Redis.from_url(valkey.url) as raw:
            assert await raw.keys("*") == [b"f:secret"], "nothing is left, in the indexes neither"


async def test_pages_have_each_session_once_newest_first(one: SessionStore, raw: Redis) -> None:
    runs = [await begin(one) for _ in range(7)]
    foreign = await begin(one, tenant="another")
    for run in runs[3:6]:  # opened in the same millisecond
        await raw.zadd(f"f:index:{TENANT}", {run.session: 5.0})
    await raw.zadd(f"f:index:{TENANT}", {run.session: index for index, run in enumerate(runs[:3])})
    ties = sorted((run.session for run in runs[3:6]), reverse=True)
    expected = [runs[6].session, *ties, runs[2].session, runs[1].session, runs[0].session]
    for size in (1, 2, 3, 7, 8):
        seen: list[str] = []
        token, pages = "", 0
        while pages == 0 or token:
            records, token = await one.list_sessions(TENANT, size, token)
            assert len(records) == min(size, 7 - len(seen))
            seen += [record.session for record in records]
            pages += 1
        assert seen == expected and pages == -(-7 // size)
    assert [record.session for record in (await one.list_sessions("another", 5, ""))[0]] == [foreign.session]
    assert (await one.list_sessions("nobody", 5, "")) == ([], "")
    assert len((await one.list_sessions(TENANT, 0, ""))[0]) == 1


async def test_a_page_skips_and_forgets_what_has_expired(one: SessionStore, raw: Redis) -> None:
    index = f"f:index:{TENANT}"
    oldest = await begin(one)
    await raw.zadd(index, {oldest.session: 1})
    expired = [(await begin(one)).session for _ in range(3)]
    newest = await begin(one)
    await raw.zadd(index, {newest.session: 2.0**50})
    first, token = await one.list_sessions(TENANT, 1, "")
    for session in (newest.session, *expired):
        await raw.delete(Run(one, session, "", 0).key("m"))
    second, end = await one.list_sessions(TENANT, 1, token)
    assert [record.session for record in (*first, *second)] == [newest.session, oldest.session] and end == ""
    assert (await raw.zrange(index, 0, -1)) == [oldest.session.encode(), newest.session.encode()]
    letters = str.maketrans("0123456789", "abcdefghij")
    await raw.zadd(index, {f"{number:026d}".translate(letters): 2.0 + number for number in range(5500)})
    records, token = await one.list_sessions(TENANT, 1, "")
    assert records == [] and token, "very many expired ones are not looked at in one call"
    records, token = await one.list_sessions(TENANT, 1, token)
    assert [record.session for record in records] == [oldest.session] and token == ""
    assert await raw.zcard(index) == 1


async def test_openings_keep_the_index_from_filling_up_with_the_expired(one: SessionStore, raw: Redis) -> None:
    index = f"f:index:{TENANT}"
    for _ in range(200):
        run = await begin(one)
        await raw.delete(run.key("m"))
    assert await raw.zcard(index) < 20


@pytest.mark.parametrize("token", ["x", "é", "bm90aGluZw==", encode_page_token(b"-1", b"a" * 26), "MTo="])
async def test_a_strange_page_token_is_refused(one: SessionStore, token: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await one.list_sessions(TENANT, 1, token)
    assert [violation.field for violation in raised.value.violations] == ["page_token"]


async def test_detached_generations_of_the_dead_are_orphans(one: SessionStore, two: SessionStore, raw: Redis) -> None:
    mine = await begin(one, detached=True)
    await begin(one)
    finished = await begin(one, detached=True)
    await finished.finish(0)
    where = (TENANT, mine.session, mine.generation)
    await one.renew_lease()
    assert 0 < await raw.pttl("f:lease:one") <= LEASE_SECONDS * 1000
    assert await two.orphans() == []
    await one.release_lease()
    assert await two.orphans() == [(*where, "one")]
    await two.renew_lease()
    assert isinstance(await two.claim(*where, expected_owner="one"), Claimed)
    assert await one.orphans() == []
    await two.release_lease()
    assert await one.orphans() == [(*where, "two")]
    await raw.hset("f:detached", f"{TENANT}:{mine.session}.{'0' * 16}", "one")
    assert await one.orphans() == [(*where, "two")]
    assert await raw.hlen("f:detached") == 1, "what does not run is forgotten"


@pytest.mark.parametrize("count", [1000, 1023])
async def test_a_log_takes_at_most_ten_bytes_per_token(one: SessionStore, raw: Redis, count: int) -> None:
    """1023 is the worst case: the string has just been doubled."""
    run = await begin(one)
    for first in range(0, count, 250):
        await one.write([run.append_at(offset, [offset]) for offset in range(first, min(first + 250, count))])
    assert await raw.strlen(run.record_key + ":c0") == 4 * count
    assert (await raw.memory_usage(run.record_key + ":c0", samples=0) or 0) <= 10 * count
    assert (await run.record()).logs == [list(range(count))]


async def test_the_records_of_a_session_are_small(one: SessionStore, raw: Redis) -> None:
    run = await begin(one, prompt_ids=pack_ids(range(100)), spec=bytes(100), messages=bytes(100))
    sizes = [await raw.memory_usage(key, samples=0) or 0 for key in await keys_of(raw, run)]
    assert sum(sizes) - 600 < 2500
