"""Failpoints do what they are told at the counted passing, and nothing without testing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from services.common import failpoints


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.configure({}, testing=False)


def test_raises_at_the_counted_passing_only() -> None:
    failpoints.configure({"FERMATA_FAILPOINTS": "a.b:raise@3,c:raise"}, testing=True)
    failpoints.hit("a.b")
    failpoints.hit("a.b")
    with pytest.raises(failpoints.FailpointError):
        failpoints.hit("a.b")
    failpoints.hit("a.b")
    with pytest.raises(failpoints.FailpointError):
        failpoints.hit("c")


def test_nothing_is_armed_without_testing() -> None:
    failpoints.configure({"FERMATA_FAILPOINTS": "a:raise", "FERMATA_PLANT": "bug"}, testing=False)
    failpoints.hit("a")
    assert not failpoints.planted("bug")


def test_planted_bugs_are_named() -> None:
    failpoints.configure({"FERMATA_PLANT": "one,two"}, testing=True)
    assert failpoints.planted("two")
    assert not failpoints.planted("three")


def test_a_failpoint_that_does_not_parse_is_refused() -> None:
    with pytest.raises(ValueError, match="name:action@count"):
        failpoints.configure({"FERMATA_FAILPOINTS": "a:explode"}, testing=True)


def test_kill_is_a_real_sigkill() -> None:
    code = (
        "from services.common import failpoints\n"
        "failpoints.configure({'FERMATA_FAILPOINTS': 'x:kill@2'}, testing=True)\n"
        "failpoints.hit('x'); print('once', flush=True); failpoints.hit('x'); print('never')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (-9, "once\n")


def test_a_callback_runs_at_the_counted_passing() -> None:
    seen: list[str] = []
    failpoints.on("x", lambda: seen.append("now"), count=2)
    failpoints.hit("x")
    assert seen == []
    failpoints.hit("x")
    failpoints.hit("x")
    assert seen == ["now"]
