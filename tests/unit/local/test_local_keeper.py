"""Keeping one program running."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.local.keeper import Backoff, Change, Keeper, Probe, Program, Readiness, ReadyPipe, log_tail
from services.local.state import ProcessState

STARTING, RUNNING, DEAD = ProcessState.STARTING, ProcessState.RUNNING, ProcessState.DEAD

TELL = "import os, sys, time; tell = lambda text: os.write(int(sys.argv[-1].partition('=')[2]), text.encode());"
STAYS = TELL + "tell('1 2\\n'); time.sleep(60)"
ENDS = TELL + "tell('1 2\\n'); time.sleep(0.3); sys.exit(3)"
FAILS = "import os, sys; print('attempt', os.getpid()); sys.exit('no model')"
HANGS_UP = TELL + "os.close(int(sys.argv[-1].partition('=')[2])); time.sleep(60)"
TELLS_OTHERS = TELL + "tell('1 3\\n'); time.sleep(60)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + STAYS
NEVER_READY = "import time; time.sleep(60)"


class Watched:
    """A keeper with the changes that it told."""

    def __init__(
        self, code: str, log: Path, *, readiness: Callable[[], Readiness], restart: dict[str, str] | None = None
    ) -> None:
        first = {**os.environ, "LIFE": "first"}
        program = Program(
            service="shard",
            index=0,
            address="127.0.0.1:1",
            command=[sys.executable, "-S", "-c", code],
            environment=first,
            restart_environment={**os.environ, "LIFE": "later"} if restart is None else restart,
            readiness=readiness,
        )
        self.changes: queue.SimpleQueue[Change] = queue.SimpleQueue()
        self.log = log
        self.keeper = Keeper(program, log, self.changes.put)
        self.keeper.start()

    def next(self, state: ProcessState) -> Change:
        change = self.changes.get(timeout=10)
        assert change.state is state
        return change

    def stop(self, grace: float = 10) -> None:
        self.keeper.ask_to_stop()
        self.keeper.wait_stopped(grace)


Watch = Callable[..., Watched]


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    watched: list[Watched] = []

    def start(code: str, readiness: Callable[[], Readiness] = lambda: ReadyPipe("1 2")) -> Watched:
        watched.append(Watched(code, tmp_path / "shard-0.log", readiness=readiness))
        return watched[-1]

    yield start
    for item in watched:
        item.stop()


def test_delays_double_and_begin_again_after_a_long_life() -> None:
    backoff = Backoff()
    assert [backoff.after(0.1) for _ in range(7)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert backoff.after(30.0) == 0.2
    assert backoff.after(29.9) == 0.4


def test_ready_then_ended_then_started_again_with_back_off(watch: Watch) -> None:
    watched = watch(ENDS)
    pids, begins = set(), []
    for delay in (0.2, 0.4):
        started = watched.next(STARTING)
        begins.append(time.monotonic())
        assert started.process is not None
        pids.add(started.process.pid)
        assert watched.next(RUNNING).text.startswith("shard-0 is ready on 127.0.0.1:1 after ")
        ended = watched.next(DEAD)
        assert ended.process is None
        assert ended.text == f"shard-0 ended with status 3; it is started again in {delay:.1f} s"
    watched.next(STARTING)
    begins.append(time.monotonic())
    assert len(pids) == 2
    assert 0.2 <= begins[1] - begins[0] < begins[2] - begins[1]
    assert begins[2] - begins[1] >= 0.4


def test_a_killed_program_is_started_again(watch: Watch) -> None:
    watched = watch(STAYS)
    process = watched.next(STARTING).process
    assert process is not None
    watched.next(RUNNING)
    os.kill(process.pid, signal.SIGKILL)
    assert "was ended by signal 9" in watched.next(DEAD).text
    assert watched.next(STARTING).process not in (None, process)
    watched.next(RUNNING)


def test_what_cannot_start_is_given_up_with_its_last_words(watch: Watch) -> None:
    watched = watch(FAILS)
    for _ in range(2):
        watched.next(STARTING)
        ended = watched.next(DEAD)
    assert "shard-0 ended with status 1 before it was ready, 2 times" in ended.failure
    assert ended.failure.endswith("no model")
    assert ended.failure.count("attempt") == 1, "the words of the last attempt only"
    assert watched.log.read_text().count("no model") == 2, "the log has both"


@pytest.mark.parametrize("code", [HANGS_UP, TELLS_OTHERS])
def test_a_program_that_lost_its_way_is_killed(watch: Watch, code: str) -> None:
    watched = watch(code)
    watched.next(STARTING)
    assert "was ended by signal 9" in watched.next(DEAD).text


def test_ready_when_a_question_is_answered(watch: Watch) -> None:
    asked = []

    def answers() -> bool:
        asked.append(time.monotonic())
        return len(asked) == 3

    watched = watch(NEVER_READY, lambda: Probe(answers))
    watched.next(STARTING)
    watched.next(RUNNING)
    assert len(asked) == 3


def test_a_program_that_ended_is_asked_no_more(watch: Watch) -> None:
    watched = watch(FAILS, lambda: Probe(lambda: False))
    watched.next(STARTING)
    assert "ended with status 1" in watched.next(DEAD).text


@pytest.mark.parametrize("code", [STAYS, NEVER_READY])
def test_stops_with_a_term_signal(watch: Watch, code: str) -> None:
    watched = watch(code)
    process = watched.next(STARTING).process
    if code is STAYS:
        watched.next(RUNNING)
    began = time.monotonic()
    watched.stop(grace=10)
    assert time.monotonic() - began < 5
    assert process is not None
    assert not Path(f"/proc/{process.pid}").exists()
    assert watched.next(DEAD).text == ""
    assert watched.changes.empty()


def test_kills_what_does_not_stop(watch: Watch) -> None:
    watched = watch(STUBBORN)
    watched.next(STARTING)
    watched.next(RUNNING)
    began = time.monotonic()
    watched.stop(grace=0.3)
    assert 0.3 <= time.monotonic() - began < 5
    watched.next(DEAD)


def test_stops_a_stopped_process_in_a_hurry(watch: Watch) -> None:
    watched = watch(STAYS)
    process = watched.next(STARTING).process
    watched.next(RUNNING)
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    watched.keeper.hurry()  # nobody has asked it to stop: nothing happens
    watched.keeper.ask_to_stop()
    watched.keeper.hurry()
    watched.keeper.wait_stopped(60)
    watched.next(DEAD)


def test_stops_while_it_waits_for_the_next_attempt(watch: Watch) -> None:
    watched = watch(ENDS)
    for _ in range(4):
        watched.next(STARTING), watched.next(RUNNING), watched.next(DEAD)
    began = time.monotonic()  # the next attempt is 1.6 s away
    watched.stop()
    assert time.monotonic() - began < 1.0


def test_the_program_has_a_session_of_its_own_and_nothing_of_ours(watch: Watch) -> None:
    code = (
        "import json, os; fds = [int(name) for name in os.listdir('/proc/self/fd')];"
        "print(json.dumps([os.getsid(0) == os.getpid(), len(os.read(0, 1)), os.environ['LIFE'], fds]), flush=True);"
    )
    with Path(os.devnull).open() as ours:
        os.set_inheritable(ours.fileno(), True)
        watched = watch(code + ENDS)
        for _ in range(2):
            watched.next(STARTING), watched.next(RUNNING), watched.next(DEAD)
        watched.stop()
    for life, line in zip(("first", "later"), watched.log.read_text().splitlines(), strict=False):
        *facts, descriptors = json.loads(line)
        assert facts == [True, 0, life]
        assert len(descriptors) == 5, "the standard ones, the pipe, and the folder that is being listed"


def test_a_pipe_is_closed_at_both_ends(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for code in (ENDS, FAILS):
        readiness = ReadyPipe("1 2")
        with subprocess.Popen(
            [sys.executable, "-S", "-c", code, *readiness.arguments()],
            pass_fds=readiness.descriptors(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert readiness.wait(process, 10) is (code is ENDS)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_time_to_get_ready_is_limited() -> None:
    readiness = ReadyPipe("1 2")
    with subprocess.Popen(
        [sys.executable, "-S", "-c", NEVER_READY, *readiness.arguments()], pass_fds=readiness.descriptors()
    ) as process:
        assert not readiness.wait(process, 0.1)
        process.kill()


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {index}\n" for index in range(50)))
    assert log_tail(log).splitlines() == [f"line {index}" for index in range(30, 50)]
    end = log.stat().st_size
    assert log_tail(log, end) == "(nothing)"
