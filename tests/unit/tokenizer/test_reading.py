"""One choice as a reader sees it: counts, text, tails; over every cutting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fermata.running_hash import hash_ids
from services.common.errors import InternalError
from services.common.vocabulary import Vocabulary
from services.tokenizer.events import ended_text, shown_text
from services.tokenizer.reading import Arrived, ChoiceReading, TopEntries

BYTES = Vocabulary([bytes([byte]) for byte in range(256)], {})


def arrived(ids: list[int], first: int, end: int, held: int = 0) -> Arrived:
    return Arrived(first, ids[first:end], held, hash_ids(ids[:end]), end)


@given(
    text=st.text(max_size=40),
    cuts=st.lists(st.tuples(st.integers(0, 45), st.integers(0, 9), st.booleans()), max_size=30),
    stop=st.text(min_size=1, max_size=3),
)
def test_texts_add_up_over_any_cutting_overlap_and_joining(
    text: str, cuts: list[tuple[int, int, bool]], stop: str
) -> None:
    """R2: text(b) - text(a-1), whatever came before; what was delivered already changes nothing."""
    ids = list(text.encode())
    reading = ChoiceReading(0)
    shown = ""
    end = len(ids)
    for start, length, take in [*cuts, (0, 100, True)]:
        first = min(start, reading.count)
        last = min(first + length, end)
        said = bytes(ids[:last])
        visible = shown_text(said, [stop.encode()])
        if last > reading.count:
            # Just as the orchestrator says it: what may still become the stop string, of all bytes so far.
            held = max((k for k in range(len(stop.encode())) if said.endswith(stop.encode()[:k])), default=0)
            assert reading.accept(arrived(ids, first, last, held))
            assert reading.running_hash == hash_ids(ids[:last])
            if take:
                shown += reading.take(BYTES).text
                assert shown == visible
        else:
            assert not reading.accept(arrived(ids, first, last))
    shown += reading.take(BYTES).text
    assert shown + reading.finish(0) == text


def test_a_gap_is_an_error() -> None:
    reading = ChoiceReading(0, 3)
    with pytest.raises(InternalError, match="3 to 4 are missing"):
        reading.accept(Arrived(5, [1], 0, b"", 0))


def test_logprobs_follow_their_tokens() -> None:
    reading = ChoiceReading(0)
    tops = [TopEntries([index], [-0.5]) for index in range(4)]
    reading.accept(Arrived(0, [65, 66], 0, b"a", 0, [-1.0, -2.0], tops[:2]))
    reading.accept(Arrived(1, [66, 67, 68], 0, b"b", 2, [-2.0, -3.0, -4.0], tops[1:]))
    delta = reading.take(BYTES)
    assert (delta.first_offset, list(delta.token_ids), delta.text) == (0, [65, 66, 67, 68], "ABCD")
    assert (delta.logprobs, delta.top_logprobs) == ([-1.0, -2.0, -3.0, -4.0], tops)
    assert reading.durable_count == 2
    assert not reading.has_news
    reading.accept(Arrived(4, [69], 0, b"c", 1, [-5.0], [tops[0]]))
    assert reading.take(BYTES).logprobs == [-5.0]
    assert reading.durable_count == 2


def test_what_can_be_handed_back() -> None:
    reading = ChoiceReading(0, 3, [1, 2], b"h")
    reading.accept(Arrived(5, [3], 0, b"i", 0))
    assert reading.count == 6
    assert [list(reading.ids_from(offset) or ()) for offset in (3, 5, 6)] == [[1, 2, 3], [3], []]
    assert reading.ids_from(2) is None
    assert reading.ids_from(7) is None
    assert reading.ids_from(-1) is None
    assert reading.take(BYTES).first_offset == 5


def test_a_resumed_text_begins_with_what_is_pending() -> None:
    reading = ChoiceReading(0, 2)
    reading.begin("日".encode()[:2])
    reading.accept(Arrived(2, list("日".encode()[2:]), 0, b"", 0))
    assert reading.take(BYTES).text == "日"


@pytest.mark.parametrize(
    ("said", "stops", "expected"),
    [
        (b"abc", [], "abc"),
        (b"abc", [b"cd", b"bcx"], "a"),
        (b"ab\xe6\x97", [], "ab"),
        (b"ab\xe6\x97", [b"b"], "ab"),
        ("x日".encode(), ["日本".encode()], "x"),
        (b"", [b"a"], ""),
    ],
)
def test_what_is_shown_of_a_choice_that_goes_on(said: bytes, stops: list[bytes], expected: str) -> None:
    assert shown_text(said, stops) == expected


def test_what_is_shown_of_a_choice_that_has_ended() -> None:
    assert ended_text(b"abcSTOP\xe6", 5) == "abc"
    assert ended_text(b"abc\xe6", 0) == "abc\ufffd"
