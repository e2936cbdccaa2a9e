"""The log: one event per line in both forms, with what it is about."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.common import logs, tracing
from services.common.logs import bound, configure_logging

ROOT = Path(__file__).resolve().parents[3]
TRACE_ID = bytes(range(16))
SESSION_ID = "abcdefghijklmnopqrstuvwxyz"
GENERATION_ID = f"{SESSION_ID}.0123456789abcdef"
log = logging.getLogger("services.example")


class Written:
    """A log file and what stands in it."""

    def __init__(self, file: Path, *, json: bool) -> None:
        self._file = file
        configure_logging("example", file=file, json=json)

    @property
    def lines(self) -> list[str]:
        return self._file.read_text(encoding="utf-8").removesuffix("\n").split("\n")

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Takes away what a test configured; the handlers of the test runner come back."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in before:
            handler.close()
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture
def text(tmp_path: Path) -> Written:
    return Written(tmp_path / "text.log", json=False)


@pytest.fixture
def lines(tmp_path: Path) -> Written:
    return Written(tmp_path / "lines.log", json=True)


def test_a_json_line_has_all_fields(lines: Written) -> None:
    log.warning("shard %s: %d left", "127.0.0.1:1", 3)
    (event,) = lines.events
    stamp = event.pop("timestamp")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", stamp)
    assert event == {
        "level": "WARNING",
        "service": "example",
        "pid": os.getpid(),
        "logger": "services.example",
        "message": "shard 127.0.0.1:1: 3 left",
    }


def test_a_text_line_is_short(text: Written) -> None:
    log.info("serving on port %d", 7433)
    (line,) = text.lines
    stamp, rest = line.split(" ", 1)
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}", stamp)
    assert rest == f"I example[{os.getpid()}] services.example: serving on port 7433"


def test_the_time_is_that_of_the_event_in_utc(lines: Written) -> None:
    log.handle(logging.makeLogRecord({"msg": "then", "created": 1_700_000_000.25, "levelno": logging.INFO}))
    assert lines.events[0]["timestamp"] == "2023-11-14T22:13:20.250Z"


def test_what_is_bound_stands_in_every_line_inside(lines: Written) -> None:
    with bound(session_id=SESSION_ID):
        with bound(generation_id=GENERATION_ID, trace_id=TRACE_ID):
            log.info("inner")
        log.info("outer")
    log.info("outside")
    subjects = [{name: event[name] for name in event if name.endswith("_id")} for event in lines.events]
    assert subjects == [
        {"trace_id": TRACE_ID.hex(), "generation_id": GENERATION_ID, "session_id": SESSION_ID},
        {"session_id": SESSION_ID},
        {},
    ]


def test_text_has_it_at_the_end(text: Written) -> None:
    with bound(session_id=SESSION_ID):
        log.info("opened")
        with bound(generation_id=GENERATION_ID, trace_id=TRACE_ID):
            log.info("claimed")
    assert [line.partition("services.example: ")[2] for line in text.lines] == [
        f"opened [session={SESSION_ID}]",
        f"claimed [trace={TRACE_ID.hex()} generation={GENERATION_ID}]",
    ]


def test_a_traced_call_says_what_it_is_about(lines: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    call = tracing.TracedCall(tracing.new_trace(sampled=False))
    monkeypatch.setattr(logs, "current_call", lambda: call)
    log.info("asked")
    call.generation_id = GENERATION_ID
    log.info("named")
    with bound(generation_id="another"):
        log.info("bound")
    trace_id = call.context.trace_id.hex()
    found = [(event["trace_id"], event.get("generation_id")) for event in lines.events]
    assert found == [(trace_id, None), (trace_id, GENERATION_ID), (trace_id, "another")]


def test_what_a_record_says_itself_stands(lines: Written) -> None:
    with bound(generation_id=GENERATION_ID):
        log.info("adopted", extra={"generation_id": "another", "epoch": 3})
    (event,) = lines.events
    assert (event["generation_id"], event["epoch"]) == ("another", 3)


async def test_tasks_keep_apart(lines: Written) -> None:
    async def work(name: str) -> None:
        with bound(generation_id=name):
            await asyncio.sleep(0)
            log.info("%s", name)

    await asyncio.gather(*map(work, "abc"))
    assert sorted((event["message"], event["generation_id"]) for event in lines.events) == [
        (name, name) for name in "abc"
    ]


async def test_an_abandoned_generator_can_be_closed_elsewhere(lines: Written) -> None:
    async def events() -> AsyncIterator[int]:
        with bound(generation_id=GENERATION_ID):
            yield 1
            yield 2

    generator: Any = events()
    await asyncio.create_task(anext(generator))
    await generator.aclose()
    log.info("after")
    assert "generation_id" not in lines.events[0]


def test_an_exception_is_a_field_of_the_line(lines: Written) -> None:
    try:
        raise ValueError("no\nsuch thing")
    except ValueError:
        log.exception("unexpected")
    (event,) = lines.events
    assert event["message"] == "unexpected"
    assert event["exception"].startswith("Traceback (most recent call last):\n")
    assert event["exception"].endswith("ValueError: no\nsuch thing")


def test_an_exception_follows_its_line_of_text(text: Written) -> None:
    try:
        raise ValueError("no such thing")
    except ValueError:
        with bound(generation_id=GENERATION_ID):
            log.exception("unexpected")
    first, second, *_, last = text.lines
    assert first.endswith(f"unexpected [generation={GENERATION_ID}]")
    assert (second, last) == ("Traceback (most recent call last):", "ValueError: no such thing")


NASTY = "one\ntwo\r\x1b[2Jthree\u2028four\x85five"


def test_line_breaks_stay_in_one_line(lines: Written, tmp_path: Path) -> None:
    log.info("peer says %s", NASTY)
    with bound(session_id=NASTY):
        log.info("bound")
    assert [event["message"] for event in lines.events] == [f"peer says {NASTY}", "bound"]
    assert lines.events[1]["session_id"] == NASTY
    assert all(line.isascii() and line.isprintable() for line in lines.lines)
    text = Written(tmp_path / "text.log", json=False)
    with bound(session_id=NASTY):
        log.info("peer says %s", NASTY)
    (line,) = text.lines
    assert line.isprintable()
    assert "one\\x0atwo\\x0d\\x1b[2Jthree\\u2028four\\x85five [session=one\\x0atwo" in line


@pytest.mark.parametrize("as_json", [True, False])
def test_what_cannot_be_written_is_written_as_text(tmp_path: Path, as_json: bool) -> None:
    written = Written(tmp_path / "log", json=as_json)
    thing, raw = object(), b"\xff"
    log.info("%s %r %s", thing, raw, "\udcff", extra={"thing": thing, "raw": raw, "names": {1, 2}})
    (line,) = written.lines
    message = f"{thing} {raw!r} "
    if as_json:
        (event,) = written.events
        assert event["message"] == f"{message}\udcff"
        assert event["thing"] == str(thing)
        assert {"raw", "names"} <= event.keys()
    else:
        assert line.endswith(f"{message}\\udcff")


def test_a_line_that_cannot_be_made_hurts_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = Written(tmp_path / "log", json=True)  # here, as the test runner's handlers of this phase would raise
    log.info("%d tokens", "many")
    log.info("after")
    assert [event["message"] for event in written.events] == ["after"]
    assert "Logging error" in capsys.readouterr().err


def test_debugging_is_left_out(lines: Written) -> None:
    log.debug("detail")
    log.info("fact")
    assert [event["message"] for event in lines.events] == ["fact"]


def test_without_a_file_it_is_standard_error() -> None:
    code = (
        "import logging; from services.common.logs import configure_logging\n"
        "configure_logging('example', json=True); logging.info('hello')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, json.loads(done.stderr)["message"]) == ("", "hello")
