"""Stop strings over bytes against the obvious search in the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.orchestrator.stops import StopMatch, StopMatcher

SMALL_ALPHABET = st.sampled_from([b"a", b"b", "é".encode()[:1], "é".encode()[1:]])
PIECES = st.lists(st.lists(SMALL_ALPHABET, max_size=4).map(b"".join), max_size=20)
STOPS = st.lists(st.lists(SMALL_ALPHABET, min_size=1, max_size=5).map(b"".join), min_size=1, max_size=4)


def first_completion(text: bytes, stops: list[bytes]) -> tuple[int, int] | None:
    """(end, length) of the first completed stop, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return end, max(lengths)
    return None


def longest_held(text: bytes, stops: list[bytes]) -> int:
    return max(
        (size for stop in stops for size in range(min(len(stop) - 1, len(text)) + 1) if text.endswith(stop[:size])),
        default=0,
    )


@given(PIECES, STOPS)
def test_matches_where_a_search_in_the_whole_text_does(pieces: list[bytes], stops: list[bytes]) -> None:
    matcher = StopMatcher(stops)
    text = b""
    for piece in pieces:
        text += piece
        match = matcher.feed(piece)
        expected = first_completion(text, stops)
        if expected is None:
            assert match is None
            assert matcher.held == longest_held(text, stops)
        else:
            assert match is not None
            assert (len(text) - match.rest, match.length) == expected
            assert len(stops[match.stop]) == match.length
            return


def test_a_stop_string_may_begin_and_end_within_tokens() -> None:
    matcher = StopMatcher([b"END"])
    assert matcher.feed(b"xxE") is None
    assert matcher.held == 1
    assert matcher.feed(b"N") is None
    assert matcher.held == 2
    assert matcher.feed(b"Dyy") == StopMatch(stop=0, length=3, rest=2)


def test_a_restart_within_a_partial_match_is_found() -> None:
    matcher = StopMatcher([b"aab"])
    assert matcher.feed(b"aaab") == StopMatch(0, 3, 0)


def test_no_stop_strings_hold_nothing() -> None:
    matcher = StopMatcher([])
    assert matcher.feed(b"anything") is None
    assert matcher.held == 0
