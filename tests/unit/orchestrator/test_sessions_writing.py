"""Writing and owning in the session store, against a real server (R9, R10, R12, R13)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.common import failpoints
from services.common.errors import SessionBusy
from services.common.types import FinishReason
from services.orchestrator.session_records import Claimed, Refused, ResultKind, Terminal, random_ids
from services.orchestrator.sessions import SessionStore
from tests.unit.orchestrator.store_helpers import TENANT, LossyLink, Run, begin, open_stores
from tests.valkey import Valkey

BINARY = bytes(range(256))
CANCELLED = FinishReason.CANCELLED


# --- writing (R10, R13) ------------------------------------------------------------------------------------------


async def test_appends_compare_what_is_stored(one: SessionStore) -> None:
    run = await begin(one, choices=2)
    assert (await run.append(0, [1, 2, 3])).kind is ResultKind.OK
    assert (await run.append(3, [4])).kind is ResultKind.OK
    for first, ids in ((0, [1, 2, 3]), (0, [1, 2, 3, 4]), (1, [2]), (4, []), (0, [])):
        assert (await run.append(first, ids)).kind is ResultKind.DUPLICATE
    for first in (5, 6):
        gap = await run.append(first, [7])
        assert (gap.kind, gap.count) == (ResultKind.CONFLICT, 4)
    for first, ids in ((0, [9]), (3, [5]), (2, [3, 5, 6]), (0, [1, 2, 3, 4 + 256])):
        other = await run.append(first, ids)
        assert (other.kind, other.count) == (ResultKind.DIVERGED, 4)
    assert (await run.append(2, [3, 4, 5, 6])).kind is ResultKind.OK, "a retry that has grown"
    assert (await run.append(0, [2**32 - 1, 0], choice=1)).kind is ResultKind.OK
    assert (await run.record()).logs == [[1, 2, 3, 4, 5, 6], [2**32 - 1, 0]]


async def test_appends_to_what_is_not_there(one: SessionStore) -> None:
    run = await begin(one, choices=2)
    for missing in (
        Run(one, random_ids()[0], run.generation, run.epoch),
        Run(one, run.session, "0" * 16, run.epoch),
        Run(one, run.session, run.generation, run.epoch, tenant="another"),
    ):
        for result in (await missing.append(0, [1]), await missing.finish(0), await missing.park()):
            assert result.kind is ResultKind.MISSING
    assert (await run.append(0, [1], choice=2)).kind is ResultKind.MISSING


async def test_an_ending_is_written_once(one: SessionStore) -> None:
    run = await begin(one)
    terminal = Terminal(
        0,
        FinishReason.STOP_STRING,
        count=2,
        cut_bytes=3,
        stop_string='"\x00\\ü\U0001f600',
        error=BINARY,
        prompt_tokens=11,
        cached_tokens=8,
    )
    early = await run.write(run.finish_with(terminal))
    assert (early.kind, early.count) == (ResultKind.CONFLICT, 0)
    await run.append(0, [1, 2])
    assert (await run.write(run.finish_with(terminal))).kind is ResultKind.OK
    assert (await run.write(run.finish_with(terminal))).kind is ResultKind.DUPLICATE
    for refused in (await run.append(2, [3]), await run.finish(2), await run.park(), await run.append(1, [2, 3])):
        assert (refused.kind, refused.terminal) == (ResultKind.FINISHED, terminal)
    assert (await run.append(0, [1, 2])).kind is ResultKind.DUPLICATE, "a retried append needs no open log"
    record = await run.record()
    assert record.terminals == {0: terminal} and record.finished and record.cached_tokens == 8
    assert (await run.meta()).state == "idle" and (await run.meta()).active == ""


@pytest.mark.parametrize("reason", [reason for reason in FinishReason if reason])
async def test_every_reason_is_kept(one: SessionStore, reason: FinishReason) -> None:
    run = await begin(one)
    terminal = Terminal(0, reason, 0, stop_token_id=0 if reason is FinishReason.STOP_TOKEN else None)
    await run.write(run.finish_with(terminal))
    assert (await run.record()).terminals == {0: terminal}


async def test_the_last_choice_frees_the_session(one: SessionStore, raw: Redis) -> None:
    run = await begin(one, choices=2, detached=True)
    assert (await run.finish(0)).kind is ResultKind.OK
    assert (await run.meta()).state == "running" and len(await one.orphans()) == 1
    assert (await run.finish(0, choice=1)).kind is ResultKind.OK
    assert (await run.meta()).state == "idle" and await raw.hlen("f:detached") == 0


async def test_one_call_writes_for_many_sessions(one: SessionStore, two: SessionStore) -> None:
    runs = [await begin(one) for _ in range(5)]
    claimed = await two.claim(TENANT, runs[1].session, runs[1].generation, expected_owner="one")
    assert isinstance(claimed, Claimed)
    calls, flushes, tokens = one.calls, one.flushes, one.appended_tokens
    operations = [run.append_at(0, [10, 11]) for run in runs]
    operations[3] = runs[3].append_at(1, [9])
    finish = runs[0].finish_with(Terminal(0, FinishReason.MAX_TOKENS, 2))
    results = await one.write([*operations, operations[0], finish, runs[0].append_at(2, [1])])
    kinds = ["OK", "FENCED", "OK", "CONFLICT", "OK", "DUPLICATE", "OK", "FINISHED"]
    assert [result.kind.name for result in results] == kinds
    assert (one.calls - calls, one.flushes - flushes, one.appended_tokens - tokens) == (1, 1, 6)
    assert await one.write([]) == [] and one.calls - calls == 1


async def test_contradictions_are_never_sent(one: SessionStore) -> None:
    run = await begin(one)
    terminal = Terminal(0, CANCELLED, 1)
    finish = run.finish_with(terminal)
    wrong = type(finish)(TENANT, run.session, run.generation, 0, run.epoch, terminal, 2)
    append = run.append_at(0, [1])
    torn = type(append)(TENANT, run.session, run.generation, 0, run.epoch, 0, b"\x01\x02\x03")
    calls = one.calls
    for operation in (wrong, torn):
        with pytest.raises(ValueError):
            await one.write([append, operation])
    assert one.calls == calls and (await run.record()).logs == [[]]


# --- owning (R9, R10, R12) ---------------------------------------------------------------------------------------


async def test_only_one_claim_wins_and_the_old_owner_is_fenced(valkey: Valkey, one: SessionStore) -> None:
    run = await begin(one, detached=True)
    await run.append(0, [1, 2])
    async with open_stores(valkey.url, *(f"claimant-{number}" for number in range(6))) as stores:
        where = (TENANT, run.session, run.generation)
        answers = await asyncio.gather(*(store.claim(*where, expected_owner="one") for store in stores))
        (winner,) = [number for number, answer in enumerate(answers) if isinstance(answer, Claimed)]
        name, answer = f"claimant-{winner}", answers[winner]
        assert isinstance(answer, Claimed) and answer.epoch > run.epoch
        assert [answer for answer in answers if isinstance(answer, Refused)] == [
            Refused(name, f"{name}:1", finished=False)
        ] * 5
        zombie = [await run.append(2, [3]), await run.append(0, [1, 2]), await run.finish(2), await run.park()]
        assert [(z.kind, z.epoch, z.owner) for z in zombie] == [(ResultKind.FENCED, answer.epoch, name)] * 4
        assert (await run.seen_by(stores[winner], answer.epoch).append(2, [9])).kind is ResultKind.OK
        assert await one.orphans() == [(*where, name)], "the index knows the new owner"
    assert (await run.record()).logs == [[1, 2, 9]]


async def test_epochs_rise_with_the_stores_clock_and_above_it(one: SessionStore, raw: Redis) -> None:
    run = await begin(one)
    before = await one.now_ms()
    first = await one.claim(TENANT, run.session, run.generation, expected_owner="one")
    assert isinstance(first, Claimed) and first.epoch >= before
    await raw.hset(run.key("m"), "epoch", str(2**52))
    second = await one.claim(TENANT, run.session, run.generation, expected_owner="one")
    assert second == Claimed(2**52 + 1)
    assert (await run.meta()).epoch == 2**52 + 1


async def test_a_claim_ends_parking_and_a_late_park_cannot_undo_it(
    one: SessionStore, two: SessionStore, raw: Redis
) -> None:
    run = await begin(one)
    assert [(await run.park()).kind for _ in range(2)] == [ResultKind.OK, ResultKind.DUPLICATE]
    claimed = await one.claim(TENANT, run.session, run.generation, expected_owner="one")
    assert isinstance(claimed, Claimed) and (await run.meta()).state == "running"
    assert await raw.hlen("f:detached") == 0
    late = await run.park()
    assert (late.kind, late.epoch, late.owner) == (ResultKind.FENCED, claimed.epoch, "one")
    assert (await run.append(0, [1])).kind is ResultKind.OK, "the owner is the fence, the epoch only orders"
    with pytest.raises(SessionBusy):
        await begin(two, run.session)


async def test_what_was_cancelled_cannot_be_parked_again(one: SessionStore) -> None:
    run = await begin(one)
    await run.park()
    following = await begin(one, run.session)
    late = await run.seen_by(one, following.epoch).park()
    assert (late.kind, late.terminal) == (ResultKind.FINISHED, Terminal(0, CANCELLED, 0))
    assert (await following.meta()).state == "running"


async def test_what_is_finished_cannot_be_claimed(one: SessionStore, two: SessionStore) -> None:
    run = await begin(one)
    await run.finish(0)
    where = (TENANT, run.session, run.generation)
    assert await two.claim(*where, expected_owner="one") == Refused("one", "one:1", finished=True)
    following = await begin(two, run.session)
    assert await one.claim(*where, expected_owner="two") == Refused("two", "two:1", finished=True)
    assert (await following.meta()).epoch == following.epoch


async def test_the_planted_bug_lets_a_zombie_append(one: SessionStore, two: SessionStore) -> None:
    run = await begin(one)
    await two.claim(TENANT, run.session, run.generation, expected_owner="one")
    assert (await run.append(0, [1])).kind is ResultKind.FENCED
    failpoints.configure({"FERMATA_PLANT": "no_owner_check"}, testing=True)
    try:
        assert (await run.append(0, [1])).kind is ResultKind.OK
    finally:
        failpoints.configure({}, testing=False)
    assert (await run.append(1, [2])).kind is ResultKind.FENCED


async def test_lost_replies_are_repeated_without_harm(valkey: Valkey, tmp_path: Path) -> None:
    """Each call is executed twice, its first reply lost; it answers as if it had happened once (P10)."""
    async with (
        LossyLink(tmp_path / "link", valkey.socket_path) as link,
        open_stores(link.url, "one", "two") as (one, two),
    ):
        link.lose_next = True
        run = await begin(one)
        link.lose_next = True
        assert (await run.append(0, [1, 2])).kind is ResultKind.DUPLICATE
        await run.seen_by(two).meta()
        link.lose_next = True
        claimed = await two.claim(TENANT, run.session, run.generation, expected_owner="one")
        assert isinstance(claimed, Claimed)
        theirs = run.seen_by(two, claimed.epoch)
        assert (await theirs.meta()).epoch == claimed.epoch
        link.lose_next = True
        assert (await theirs.finish(2)).kind is ResultKind.DUPLICATE
        assert link.lost == 4
        record = await theirs.record()
        assert record.logs == [[1, 2]] and record.finished
        assert (await theirs.meta()).generations == [run.generation]
