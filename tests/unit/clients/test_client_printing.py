"""What a person reads: tables, pieces, errors in one line."""

from __future__ import annotations

import io

import grpc
from hypothesis import given
from hypothesis import strategies as st

from fermata.errors import FieldViolation, GenerationNotFound, InvalidRequest, Unavailable
from fermata.printing import Printer, describe, display_width, generation_rows, quote
from fermata.records import session_from
from fermata.v1 import session_pb2


def test_errors_say_what_which_why_and_what_to_do() -> None:
    violations = [FieldViolation("generation.n", "must be in [1, 8]"), FieldViolation("generation.stop", "too long")]
    assert describe(InvalidRequest("bad request", violations=violations)) == (
        "bad request; generation.n: must be in [1, 8]; generation.stop: too long (INVALID_FIELD)"
    )
    assert describe(InvalidRequest("invalid: generation.n", violations=violations[:1])) == (
        "generation.n: must be in [1, 8] (INVALID_FIELD)"
    )
    assert describe(GenerationNotFound("none")).startswith("none (GENERATION_NOT_FOUND); its session may have expired")
    error = Unavailable("refused", reason="")
    error.add_note("gave up after 60 s")
    assert describe(error) == "refused; gave up after 60 s (UNAVAILABLE)"
    assert error.code is grpc.StatusCode.UNAVAILABLE


def test_a_failure_is_one_line_whatever_it_says() -> None:
    errors = io.StringIO()
    Printer(io.StringIO(), errors).failure("first\nsecond\r\n\x1b[31mthird")
    assert errors.getvalue() == "fermata: first second \\x1b[31mthird\n"


def test_pieces_are_shown_as_they_are() -> None:
    assert [quote(piece) for piece in (b" like", "é".encode(), b"\xe2\x82", b"\n\t", b"\x1b", b'a"b')] == [
        '" like"',
        '"é"',
        '"\\xe2\\x82"',
        '"\\n\\t"',
        '"\\x1b"',
        '"a"b"',
    ]


@given(st.binary(max_size=20))
def test_pieces_never_hold_what_cannot_be_seen(piece: bytes) -> None:
    assert quote(piece).isprintable()


def test_columns_line_up_for_wide_and_combining_characters() -> None:
    output = io.StringIO()
    Printer(output, io.StringIO()).table(("PIECE", "ID"), [("漢字", "1"), ("e\u0301", "2"), ("plain text", "3")])
    lines = output.getvalue().splitlines()
    assert [display_width(line) for line in lines] == [14, 13, 13, 13]
    assert lines[1] == "漢字        1"


def test_generations_name_their_parents_shortly() -> None:
    session = session_pb2.Session(session_id="s")
    session.generations.add(generation_id="s.1", output_tokens=[3, 4], finish_reasons=[1, 0])  # type: ignore[list-item]
    session.generations.add(
        generation_id="s.2", parent_generation_id="s.1", parent_choice=1, parent_count=4, output_tokens=[5]
    )
    rows = generation_rows(session_from(session))
    assert rows[0][:5] == ("s.1", "-", "0", "3 4", "stop_token open")
    assert rows[1][1] == "1, choice 1 at 4"
