"""Where a session goes on (R17): every branch, on hand-made turns and on random ones."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tokenizer.turns import Branch, Continuation, Turn, append_to, continue_session, sequence_of

PAIRS = 0x200000


def text_of(ids: Sequence[int]) -> bytes:
    """Ids are code points here; those beyond are two letters at once, -1 is half a character."""
    return b"".join(map(bytes_of, ids))


def bytes_of(token_id: int) -> bytes:
    if token_id < 0:
        return b"\xc3"
    return bytes(divmod(token_id - PAIRS, 256)) if token_id >= PAIRS else chr(token_id).encode()


def encode(text: str, continues: bool) -> list[int]:
    """One id per letter; a beginning gets a mark of its own, as some tokenizers do."""
    return ([] if continues or not text else [ord("^")]) + [ord(letter) for letter in text]


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def pair(letters: str) -> int:
    """An id of two letters, which `encode` never makes."""
    return PAIRS + 256 * ord(letters[0]) + ord(letters[1])


def go_on(turns: list[Turn], rendered: str, choice: int = 0, first: int = 0) -> Continuation:
    return continue_session(turns, choice, rendered, first=first, text_of=text_of, encode=encode)


ROOT = Turn("s.1", Branch(), ids("^U:hi A:"), [pair("he"), *ids("llo.")])
SECOND = Turn("s.2", Branch("s.1", 0, 5), ids(" U:go A:"), ids("ok."))


def test_the_log_is_kept_where_the_rendering_starts_with_it() -> None:
    result = go_on([ROOT], "^U:hi A:hello. U:go A:")
    assert result == Continuation(Branch("s.1", 0, 5), ids(" U:go A:"), 13, 1)


def test_two_turns_and_another_choice() -> None:
    result = go_on([ROOT, SECOND], "^U:hi A:hello. U:go A:ok. U:x", choice=2)
    assert result == Continuation(Branch("s.2", 2, 3), ids(" U:x"), 24, 2)


def test_nothing_new_is_nothing_added() -> None:
    assert go_on([ROOT], "^U:hi A:hello.") == Continuation(Branch("s.1", 0, 5), [], 13, 1)


def test_it_branches_inside_an_output() -> None:
    """A stop string was cut from the text: ids of the common part stay, the next one is encoded anew."""
    turn = Turn("s.1", Branch(), ids("^U:hi A:"), ids("hello.##"))
    result = go_on([turn], "U:hi A:hello. U:go A:")
    assert result == Continuation(Branch("s.1", 0, 6), ids(" U:go A:"), 14, 1)


def test_it_branches_where_an_output_begins() -> None:
    """The output's first token is not what encoding its text gives."""
    turn = Turn("s.1", Branch(), ids("^U:hi A:"), [pair("he"), *ids("llo.##")])
    result = go_on([turn], "U:hi A:hello. U:go A:")
    assert result == Continuation(Branch("s.1", 0, 0), ids("hello. U:go A:"), 8, 1)


def test_it_branches_at_the_grandparent_when_it_falls_into_a_prompt() -> None:
    """What the template now writes differently stands in the second turn's prompt."""
    result = go_on([ROOT, SECOND], "U:hi A:hello. U:go B:ok. U:x")
    assert result.parent == Branch("s.1", 0, 0)  # `encode` would not make the pair again
    plain = Turn("s.1", Branch(), ids("^U:hi A:"), ids("hello."))
    second = Turn("s.2", Branch("s.1", 0, 6), ids(" U:go A:"), ids("ok."))
    result = go_on([plain, second], "U:hi A:hello. U:go B:ok. U:x")
    assert result == Continuation(Branch("s.1", 0, 6), ids(" U:go B:ok. U:x"), 14, 1)


def test_it_takes_the_parents_choice_and_count_at_the_grandparent() -> None:
    plain = Turn("s.1", Branch(), ids("^U:hi A:"), ids("hello. and more"))
    second = Turn("s.2", Branch("s.1", 3, 6), ids(" U:go A:"), ids("ok."))
    result = go_on([plain, second], "U:hi A:hello. U:go B:ok. U:x")
    assert result == Continuation(Branch("s.1", 3, 6), ids(" U:go B:ok. U:x"), 14, 1)


def test_it_starts_again_at_the_root() -> None:
    result = go_on([ROOT], "S:new U:hi A:hello. U:go A:")
    assert result == Continuation(Branch(), encode("S:new U:hi A:hello. U:go A:", False), 0, 0)


def test_a_rendering_that_is_shorter_than_the_log() -> None:
    turn = Turn("s.1", Branch(), ids("^U:hi A:"), ids("hello."))
    assert go_on([turn], "U:hi A:he") == Continuation(Branch("s.1", 0, 2), [], 10, 1)


def test_half_a_character_at_the_end_is_never_cut_in_two() -> None:
    """It was shown as U+FFFD and is rendered so, or by chance as the very character; neither may split bytes."""
    turn = Turn("s.1", Branch(), ids("^U:hi A:"), [*ids("a"), -1])
    for rendered in ("U:hi A:a\ufffd U:x", "^U:hi A:a\u00e4"):
        result = go_on([turn], rendered)
        assert text_of([*ids("^U:hi A:a")[: result.position], *result.token_ids]).decode().endswith(rendered[-1])
        assert result.parent.count <= 1


def test_raw_turns_before_the_conversation_stay_as_they_are() -> None:
    raw = Turn("s.1", Branch(), [1, 2, 3], [4, 5, 6])
    chat = Turn("s.2", Branch("s.1", 1, 2), ids("U:hi A:"), ids("yo."))
    assert go_on([raw], "U:hi", first=1) == Continuation(Branch("s.1", 0, 3), ids("U:hi"), 6, 1)
    kept = go_on([raw, chat], "U:hi A:yo. U:x", first=1)
    assert kept == Continuation(Branch("s.2", 0, 3), ids(" U:x"), 15, 2)
    rewritten = go_on([raw, chat], "V:hi A:yo. U:x", first=1)
    assert rewritten == Continuation(Branch("s.1", 1, 2), ids("V:hi A:yo. U:x"), 5, 1)


def test_a_turn_that_continues_a_message_is_never_the_first_one_replaced() -> None:
    plain = Turn("s.1", Branch(), ids("^U:hi A:"), ids("hello"))
    more = Turn("s.2", Branch("s.1", 0, 5), [], ids(" world"), continues_message=True)
    last = Turn("s.3", Branch("s.2", 0, 6), ids(" U:go A:"), ids("ok."))
    assert go_on([plain, more, last], "U:hi A:hellO world U:go A:ok. U:x").parent == Branch()
    assert go_on([plain, more, last], "U:hi A:hello world U:gO A:ok. U:x").parent == Branch("s.2", 0, 6)


def test_raw_ids_are_appended_as_they_are() -> None:
    assert append_to([ROOT, SECOND], 1, [7, 8]) == Continuation(Branch("s.2", 1, 3), [7, 8], 24, 2)


letters = st.text(st.sampled_from("abA:"), max_size=5)


@st.composite
def ways(draw: st.DrawFn) -> list[Turn]:
    turns: list[Turn] = []
    parent = Branch()
    for index in range(draw(st.integers(1, 4))):
        output = ids(draw(letters))
        turns.append(Turn(f"s.{index}", parent, ids(draw(letters)), output))
        parent = Branch(f"s.{index}", draw(st.integers(0, 2)), draw(st.integers(0, len(output))))
    return turns


@given(turns=ways(), rendered=st.text(st.sampled_from("abA:"), max_size=40), keeps=st.booleans())
def test_what_holds_for_every_session(turns: list[Turn], rendered: str, keeps: bool) -> None:
    """The new sequence is the rendering's text; what comes before the new ids is the log's; no longer prefix is."""

    def plainly(text: str, continues: bool) -> list[int]:
        return ids(text)

    log = sequence_of(turns)
    if keeps:
        rendered = text_of(log).decode() + rendered
    result = continue_session(turns, 1, rendered, text_of=text_of, encode=plainly)
    assert [*log[: result.position], *result.token_ids] == ids(rendered)
    kept = turns[: result.kept]
    if kept:
        assert sequence_of(kept)[: result.position] == log[: result.position]
        assert result.parent.generation_id == kept[-1].generation_id
        begins = result.position - result.parent.count
        assert log[begins : result.position] == list(kept[-1].output_ids[: result.parent.count])
    else:
        assert (result.parent, result.position) == (Branch(), 0)
    common = next((i for i, (a, b) in enumerate(zip(log, ids(rendered), strict=False)) if a != b), None)
    common = min(len(log), len(rendered)) if common is None else common
    # Only a prompt can lie between the branch and the end of what is common.
    assert result.position <= common
    assert keeps <= (result.position == len(log))


@pytest.mark.parametrize("count", range(6))
def test_a_later_turn_may_begin_anywhere_in_an_output(count: int) -> None:
    second = Turn("s.2", Branch("s.1", 0, count), ids(" U:go A:"), ids("ok."))
    assert sequence_of([ROOT, second]) == [*ROOT.prompt_ids, *ROOT.output_ids[:count], *second.prompt_ids, *ids("ok.")]
