"""The table of parts, and how times are written."""

from __future__ import annotations

import pytest

from fermata import parts, timings
from fermata.parts import duration, percent
from services.common.timings import Parts


def test_parts_are_those_of_the_server_in_its_order() -> None:
    assert tuple(parts.PARTS) == Parts._fields[1:]
    assert tuple(parts.PARTS) == tuple(name for name in timings.PARTS if name != "network")


def test_letters_tell_parts_apart() -> None:
    letters = [part.letter for part in parts.PARTS.values()]
    assert len(set(letters)) == len(letters)
    assert all(len(letter) == 1 for letter in letters)
    assert {part.name for part in parts.PARTS.values() if part.first_only} == set(Parts._fields[1:8])


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [
        (0, "0 µs"),
        (-0.4, "0 µs"),
        (999.4, "999 µs"),
        (999.6, "1.0 ms"),
        (-29_400, "-29.4 ms"),
        (412_100, "412.1 ms"),
        (999_949, "999.9 ms"),
        (999_960, "1.00 s"),
        (2_412_000, "2.41 s"),
    ],
)
def test_durations(microseconds: float, text: str) -> None:
    assert duration(microseconds) == text


def test_shares() -> None:
    assert (percent(0.944), percent(0.944, 1), percent(-0.0001, 1), percent(1)) == ("94 %", "94.4 %", "0.0 %", "100 %")
