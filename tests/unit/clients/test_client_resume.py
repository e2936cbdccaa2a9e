"""The pure decisions of resuming: what was read, whether to try again, where (R4, R16, R18)."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fermata.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    FermataError,
    GenerationNotFound,
    Internal,
    InvalidRequest,
    LogDiverged,
    NeedFrom,
    NoOrchestrator,
    NoShard,
    Overloaded,
    OwnerChanged,
    SessionBusy,
    SessionStoreUnavailable,
    SlowReader,
    Unavailable,
)
from fermata.events import Finished, FinishReason, Heartbeat, Started, Tokens, Usage
from fermata.resume import (
    GIVE_UP_AFTER,
    ChoiceCursor,
    Endpoint,
    Reading,
    Recovery,
    Where,
    candidates,
)
from fermata.running_hash import EMPTY_HASH, hash_ids
from fermata.v1 import generation_pb2, sampling_pb2

EVENT = generation_pb2.GenerationEvent()


def started(n: int = 1, endpoints: tuple[str, ...] = ()) -> Started:
    sampling, stop = sampling_pb2.SamplingParams(), sampling_pb2.StoppingParams()
    return Started("s", "s.g", 7, sampling, stop, n, None, 3, None, endpoints, EVENT)


def tokens(choice: int, first_offset: int, token_ids: list[int], before: list[int]) -> Tokens:
    running_hash = hash_ids(before + token_ids)
    return Tokens(choice, first_offset, tuple(token_ids), f"<{token_ids}>", (), (), 0, running_hash, EVENT)


def finished(choice: int, token_ids: list[int], running_hash: bytes | None = None) -> Finished:
    own_hash = hash_ids(token_ids) if running_hash is None else running_hash
    usage = Usage(3, len(token_ids), 0)
    return Finished(choice, FinishReason.STOP_TOKEN, 2, None, "", len(token_ids), own_hash, usage, None, EVENT)


def read(*chunks: list[int]) -> Reading:
    reading = Reading()
    reading.take(started())
    before: list[int] = []
    for chunk in chunks:
        reading.take(tokens(0, len(before), chunk, before))
        before += chunk
    return reading


@given(
    st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=12), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_any_interleaving_and_any_replay_gives_the_log(log: list[list[int]], chance: random.Random) -> None:
    """Choices in any order, chunks of any size, and replays of what was seen: each token counts once (P1)."""
    reading = Reading(final_only=False)
    assert reading.take(started(len(log))) is not None
    sent = [0] * len(log)
    seen: list[list[int]] = [[] for _ in log]
    while any(sent[choice] < len(ids) for choice, ids in enumerate(log)):
        choice = chance.choice([choice for choice, ids in enumerate(log) if sent[choice] < len(ids)])
        first = sent[choice]
        sent[choice] = chance.randint(first + 1, len(log[choice]))
        event = tokens(choice, first, log[choice][first : sent[choice]], log[choice][:first])
        for attempt in range(chance.randint(1, 3)):
            told = reading.take(event)
            assert (told is not None) == (attempt == 0)
        seen[choice] += event.token_ids
    for choice, ids in enumerate(log):
        assert not reading.complete
        assert reading.take(finished(choice, ids)) is not None
        assert reading.take(finished(choice, ids)) is None
    assert reading.complete
    assert seen == log
    assert [list(choice.token_ids) for choice in reading.result().choices] == log
    assert reading.cursors() == [ChoiceCursor(choice, len(ids), hash_ids(ids)) for choice, ids in enumerate(log) if ids]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=12), st.data())
def test_tails_begin_where_the_log_ends(ids: list[int], data: st.DataObject) -> None:
    reading = read(ids)
    count = data.draw(st.integers(0, len(ids)))
    reading.need_from(NeedFrom("shorter", metadata={"choice": "0", "count": str(count)}))
    (tail,) = reading.tails()
    assert (tail.choice, tail.first_offset) == (0, count)
    assert ids[:count] + list(tail.token_ids) == ids
    assert reading.cursors() == [ChoiceCursor(0, len(ids), hash_ids(ids))]
    reading.take(started())
    assert reading.tails() == [], "the log has them again"


def test_tails_that_are_not_there() -> None:
    for reading, count in ((read([1, 2]), 3), (Reading("s.g", cursors={0: 5}), 4)):
        error = NeedFrom("shorter", metadata={"choice": "0", "count": str(count)})
        with pytest.raises(NeedFrom) as caught:
            reading.need_from(error)
        assert caught.value is error
    reading = Reading("s.g", cursors={0: 5})
    reading.take(started())
    reading.take(Tokens(0, 5, (6, 7), "", (), (), 0, b"12345678", EVENT))
    reading.need_from(NeedFrom("shorter", metadata={"choice": "0", "count": "6"}))
    assert [(tail.first_offset, list(tail.token_ids)) for tail in reading.tails()] == [(6, [7])]


def test_hash_of_the_first_message_is_taken_when_the_ids_before_are_unknown() -> None:
    reading = Reading("s.g", cursors={0: 2})
    assert reading.cursors() == [ChoiceCursor(0, 2, b"")]
    reading.take(started())
    reading.take(tokens(0, 2, [3], [1, 2]))
    assert reading.cursors() == [ChoiceCursor(0, 3, hash_ids([1, 2, 3]))]
    with pytest.raises(LogDiverged):
        reading.take(tokens(0, 3, [4], [1, 2, 99]))


def test_known_ids_are_checked_from_the_first_message_on() -> None:
    reading = Reading("s.g", token_ids={0: [1, 2]})
    assert reading.cursors() == [ChoiceCursor(0, 2, hash_ids([1, 2]))]
    reading.take(started())
    with pytest.raises(LogDiverged) as caught:
        reading.take(tokens(0, 2, [3], [1, 99]))
    assert caught.value.metadata == {"choice": "0", "count": "2"}


@pytest.mark.parametrize("first_offset", [1, 3, 7])
def test_gaps_and_overlaps_ask_for_a_resume(first_offset: int) -> None:
    reading = read([1, 2])
    with pytest.raises(Unavailable) as caught:
        reading.take(tokens(0, first_offset, [5, 6, 7], [0] * first_offset))
    assert caught.value.reason == ""
    assert reading.cursors() == [ChoiceCursor(0, 2, hash_ids([1, 2]))], "nothing of it was taken"


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (finished(0, [1, 2, 3, 4]), Unavailable),
        (finished(0, [1, 2]), LogDiverged),
        (finished(0, [1, 2, 9]), LogDiverged),
        (finished(0, [1, 2, 3], b""), LogDiverged),
    ],
)
def test_ends_that_do_not_fit(end: Finished, kind: type[FermataError]) -> None:
    reading = read([1, 2, 3])
    with pytest.raises(kind):
        reading.take(end)
    assert not reading.complete
    assert reading.take(finished(0, [1, 2, 3])) is not None


@pytest.mark.parametrize(("final_only", "fits"), [(True, True), (None, True), (False, False)])
def test_end_without_tokens(final_only: bool | None, fits: bool) -> None:
    reading = Reading(final_only=final_only)
    reading.take(started())
    if fits:
        assert reading.take(finished(0, [1, 2])) is not None
    else:
        with pytest.raises(Unavailable):
            reading.take(finished(0, [1, 2]))


def test_end_of_an_empty_choice() -> None:
    reading = Reading(final_only=False)
    reading.take(started())
    assert reading.take(finished(0, [], EMPTY_HASH)) is not None
    assert reading.complete


def test_heartbeats_tell_endpoints() -> None:
    reading = Reading()
    told = []
    for event in (started(endpoints=("a:1", "b:1")), Heartbeat(("c:1",), False), Heartbeat((), False)):
        reading.take(event)
        told.append(reading.endpoints)
    assert told == [("a:1", "b:1"), ("c:1",), ("c:1",)]


def test_nothing_read_has_no_result() -> None:
    with pytest.raises(RuntimeError):
        Reading().result()


TABLE = [
    (Unavailable("link", reason=""), Where.OTHER_LINK, Where.OTHER_LINK),
    (Cancelled("link", reason=""), Where.OTHER_LINK, Where.OTHER_LINK),
    (Internal("link", reason=""), Where.OTHER_LINK, Where.OTHER_LINK),
    (Draining("x"), Where.OTHER_LINK, Where.OTHER_LINK),
    (NoOrchestrator("x"), Where.OTHER_LINK, Where.OTHER_LINK),
    (NoShard("x"), Where.SAME_LINK, Where.SAME_LINK),
    (SessionStoreUnavailable("x"), Where.SAME_LINK, Where.SAME_LINK),
    (OwnerChanged("x"), Where.SAME_LINK, Where.SAME_LINK),
    (SlowReader("x"), Where.SAME_LINK, Where.SAME_LINK),
    (NeedFrom("x"), Where.SAME_LINK, Where.SAME_LINK),
    (Overloaded("x"), None, Where.SAME_LINK),
    (Internal("a bug"), None, None),
    (DeadlineExceeded("x"), None, None),
    (LogDiverged("x"), None, None),
    (InvalidRequest("x"), None, None),
    (GenerationNotFound("x"), None, None),
    (SessionBusy("x"), None, None),
    (FermataError("x"), None, None),
]


@pytest.mark.parametrize(("error", "before", "after"), TABLE, ids=lambda value: type(value).__name__)
def test_what_is_tried_again(error: FermataError, before: Where | None, after: Where | None) -> None:
    for is_started, where in ((False, before), (True, after)):
        recovery = Recovery()
        if where is None:
            with pytest.raises(type(error)) as caught:
                recovery.remedy(error, started=is_started, now=0.0)
            assert caught.value is error
        else:
            assert recovery.remedy(error, started=is_started, now=0.0) == (0.0, where), "at once"
            assert recovery.troubled


def test_back_off_doubles_to_a_second_with_jitter() -> None:
    def delays(scale: float) -> list[float]:
        recovery = Recovery(uniform=lambda low, high: low + scale * (high - low))
        return [recovery.remedy(Unavailable("x", reason=""), started=True, now=0.0).delay for _ in range(9)]

    assert delays(1.0) == [0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    assert delays(0.0) == [delay / 2 for delay in delays(1.0)]


def test_progress_forgets_the_troubles() -> None:
    recovery = Recovery()
    for now in (0.0, 59.0):
        recovery.remedy(Unavailable("x", reason=""), started=True, now=now)
    recovery.progress()
    assert not recovery.troubled
    assert recovery.remedy(Unavailable("x", reason=""), started=True, now=100.0).delay == 0.0


@given(st.lists(st.floats(0.0, 5.0), min_size=30, max_size=200))
def test_gives_up_after_a_minute_without_progress(steps: list[float]) -> None:
    recovery = Recovery()
    error, now = Unavailable("x", reason=""), 0.0
    for step in [*steps, *[5.0] * 30]:
        try:
            now += recovery.remedy(error, started=True, now=now).delay + step
        except Unavailable as told:
            assert told is error
            assert now > GIVE_UP_AFTER - 1.0
            return
        assert now <= GIVE_UP_AFTER + 5.0
    raise AssertionError("it never gave up")


def test_the_servers_delay_is_kept() -> None:
    recovery = Recovery()
    assert recovery.remedy(NoShard("x", retry_delay=2.5), started=True, now=0.0).delay == 2.5
    with pytest.raises(NoShard):
        Recovery(1.0).remedy(NoShard("x", retry_delay=2.5), started=True, now=0.0)


@pytest.mark.parametrize(
    ("known", "failed", "order"),
    [
        ((), "", ["home", "home'"]),
        (("a",), "home", ["home", "home'", "a"]),
        (("a", "b", "c"), "a", ["b", "c", "home", "home'", "a"]),
        (("a", "b", "c"), "home", ["b", "c", "home", "home'", "a"]),
        (("a", "b", "c"), "b", ["c", "home", "home'", "a", "b"]),
        (("home", "b"), "home", ["b", "home", "home'"]),
    ],
)
def test_where_to_go_on(known: tuple[str, ...], failed: str, order: list[str]) -> None:
    expected = [Endpoint(name.rstrip("'"), int(name.endswith("'"))) for name in order]
    assert candidates("home", known, failed) == expected
