"""`fermata top`: what is drawn of an overview, and the command in a terminal and without one."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from fermata import AsyncClient, Client
from fermata.errors import Unavailable
from fermata.parts import PARTS
from fermata.statistics import (
    Latency,
    OrchestratorLoad,
    Overview,
    ReplicaOverview,
    ShardLoad,
    TokenizerLoad,
)
from fermata.top import Looks, as_json, draw
from fermata.v1 import telemetry_pb2
from fermata.v1.telemetry_pb2 import Figure, GetStatisticsResponse, Replica
from fermata.v1.telemetry_pb2_grpc import TelemetryServiceServicer, add_TelemetryServiceServicer_to_server
from services.common import rpc

SERVER = "127.0.0.1:7433"
COMMAND = [sys.executable, "-m", "fermata.cli", "top"]

TOKENIZER = ReplicaOverview("tokenizer", "127.0.0.1:40001", "here", 101, "0.1.0", 0.4, 140_000_000, None)
BUSY = Overview(
    seconds=1.0,
    tokens_per_second=2571.4,
    streams=32,
    requests_per_second=1.5,
    failed_per_second=0.0,
    token_latency=Latency(2571, 0.0125, 0.012, 0.0141, 0.0312),
    time_to_first_token=Latency(2, 0.085, 0.08, 0.0976, 0.09976),
    parts={**dict.fromkeys(PARTS, 0.0), "wait": 0.2, "forward": 0.6, "sample": 0.1, "hop": 0.06, "queue": 0.04},
    replicas=[
        replace(TOKENIZER, load=TokenizerLoad(32, 2571.4)),
        ReplicaOverview(
            *("orchestrator", "127.0.0.1:40002", "here", 102, "0.1.0", None, 1_250_000_000),
            OrchestratorLoad(32, Latency(80, 0.002, 0.0018, 0.004, 0.0071), 0.0271, 2, False),
        ),
        ReplicaOverview(
            *("shard", "127.0.0.1:40003", "here", 103, "0.1.0", 0.98, 320_000_000),
            ShardLoad(31, 1, 0.625, 31.25, 0.0121, 0.4),
        ),
        ReplicaOverview(
            *("shard", "127.0.0.1:40004", "here", 104, "0.1.0", 0.01, 300_000_000),
            ShardLoad(0, 0, 0.0, None, None, None),
        ),
    ],
)
EMPTY = Overview(1.0, 0.0, 0, 0.0, 0.0, None, None, {}, [])

SCREEN = f"""\
fermata 127.0.0.1:7433 · 1 tokenizer · 1 orchestrator · 2 shards · last 1.0 s
2,571.4 tokens/s · 32 streams · 1.5 requests/s · 0.0 failed/s

LATENCY             P50      P90      P99     MEAN  COUNT
between tokens  12.0 ms  14.1 ms  31.2 ms  12.5 ms   2571
first token     80.0 ms  97.6 ms  99.8 ms  85.0 ms      2

TOKENIZER        TOKENS/S  STREAMS   CPU  MEMORY  PID
127.0.0.1:40001   2,571.4       32  40 %  140 MB  101

ORCHESTRATOR     GENERATIONS  COMMIT P50     P99  STORE/TOKEN  TAKEOVERS  CPU  MEMORY  PID
127.0.0.1:40002           32      1.8 ms  7.1 ms        0.027          2    -  1.2 GB  102

SHARD            RUNNING  WAITING  KV                BATCH     STEP  PREFIX   CPU  MEMORY  PID
127.0.0.1:40003       31        1  ██████▎     62 %   31.2  12.1 ms    40 %  98 %  320 MB  103
127.0.0.1:40004        0        0               0 %      -        -       -   1 %  300 MB  104

WHERE THE TIME BETWEEN TWO TOKENS GOES
wait         ████                  20.0 %  shard:        {PARTS["wait"].description}
forward      ████████████          60.0 %  shard:        {PARTS["forward"].description}
sample       ██                    10.0 %  shard:        {PARTS["sample"].description}
hop          █▎                     6.0 %  network:      {PARTS["hop"].description}
queue        ▊                      4.0 %  tokenizer:    {PARTS["queue"].description}"""


def text(shown: Overview | None, width: int = 100, height: int | None = None) -> str:
    return "\n".join(line.text for line in draw(shown, SERVER, width, height))


def test_a_whole_screen() -> None:
    assert text(BUSY) == SCREEN


def test_an_empty_system() -> None:
    assert text(EMPTY) == (
        "fermata 127.0.0.1:7433 · no process answers · last 1.0 s\n"
        "0.0 tokens/s · 0 streams · 0.0 requests/s · 0.0 failed/s\n"
        "\n"
        "LATENCY         P50  P90  P99  MEAN  COUNT\n"
        "between tokens    -    -    -     -      0\n"
        "first token       -    -    -     -      0\n"
        "\n"
        "no token followed another one in this interval"
    )


def test_before_the_first_interval_is_over() -> None:
    assert text(None) == "fermata 127.0.0.1:7433\nthe first figures come after one interval"


def test_a_store_out_of_reach_is_said() -> None:
    load = OrchestratorLoad(1, None, None, 0, True)
    shown = replace(EMPTY, replicas=[replace(TOKENIZER, service="orchestrator", load=load)])
    assert "CUT OFF" in text(shown)


def test_a_narrow_terminal_drops_columns_and_cuts_lines() -> None:
    narrow = text(BUSY, 48)
    assert "2,571.4 tokens/s · 32 streams · 1.5 requests/s\n0.0 failed/s\n" in narrow
    assert "LATENCY             P50      P90      P99\n" in narrow
    assert "TOKENIZER        TOKENS/S  STREAMS   CPU  MEMORY\n" in narrow
    assert "SHARD            RUNNING  WAITING\n127.0.0.1:40003       31        1\n" in narrow
    assert "forward      ████████████          60.0 %  shar…" in narrow


@pytest.mark.parametrize("width", [1, 7, 20, 48, 79, 80, 200])
@pytest.mark.parametrize("height", [1, 2, 10, 24, 50])
def test_a_screen_never_overflows(width: int, height: int) -> None:
    for shown in (None, EMPTY, BUSY):
        lines = draw(shown, SERVER, width, height)
        assert 0 < len(lines) <= height
        assert max(len(line.text) for line in lines) <= width


def test_a_low_terminal_puts_small_parts_together() -> None:
    lines = text(BUSY, 100, len(SCREEN.splitlines()) - 1).splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["wait", "forward", "sample", "others"]
    assert lines[-1] == "others       ██                    10.0 %"


def test_a_very_low_terminal_says_what_it_hides() -> None:
    lines = text(BUSY, 100, 8).splitlines()
    assert lines[:7] == SCREEN.splitlines()[:7]
    assert lines[7] == "… 14 more lines; a higher terminal shows them"


def test_json_has_all_figures() -> None:
    line = as_json(BUSY, datetime(2026, 1, 2, 3, 4, 5, 678_900, UTC))
    found = json.loads(line)
    assert "\n" not in line
    assert found["time"] == "2026-01-02T03:04:05.678Z"
    assert (found["tokens_per_second"], found["token_latency"]["p90"]) == (2571.4, 0.0141)
    assert found["parts"]["forward"] == 0.6
    assert found["replicas"][2]["load"]["kv_usage"] == 0.625
    assert json.loads(as_json(EMPTY, datetime.now(UTC)))["token_latency"] is None


def figures(told: int) -> GetStatisticsResponse:
    counter = Figure(name="fermata.tokens.told", kind=Figure.KIND_COUNTER, value=told)
    latency = Figure(
        name="fermata.token.latency", kind=Figure.KIND_HISTOGRAM, bounds=[0.01], counts=[told, 0], total=told / 1000
    )
    replica = Replica(service="tokenizer", address="\x1b[31m:1", pid=7, figures=[counter, latency])
    return GetStatisticsResponse(replicas=[replica])


def test_a_look_that_failed_makes_the_next_interval_longer() -> None:
    answers: list[GetStatisticsResponse | Unavailable] = [
        figures(0), figures(100), Unavailable("gone", reason=""), figures(400)
    ]  # fmt: skip
    clock = iter((10.0, 11.0, 14.0))

    def ask(timeout: float | None) -> GetStatisticsResponse:
        answer = answers.pop(0)
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    looks = Looks(ask, lambda: next(clock))
    assert looks.next() is None
    second = looks.next()
    assert second is not None
    assert (second.seconds, second.tokens_per_second) == (1.0, 100.0)
    with pytest.raises(Unavailable):
        looks.next()
    third = looks.next()
    assert third is not None
    assert (third.seconds, third.tokens_per_second) == (3.0, 100.0)


class Telling(TelemetryServiceServicer):
    """Tells counters that grow by ten tokens from look to look."""

    def __init__(self) -> None:
        self.told = 0

    async def GetStatistics(
        self, request: telemetry_pb2.GetStatisticsRequest, context: Any
    ) -> telemetry_pb2.GetStatisticsResponse:
        self.told += 10
        return figures(self.told)

    async def GetTrace(self, request: telemetry_pb2.GetTraceRequest, context: Any) -> telemetry_pb2.GetTraceResponse:
        raise NotImplementedError


@asynccontextmanager
async def telling() -> AsyncIterator[str]:
    """HOST:PORT of a server that tells."""
    server = rpc.public_server(reuse_port=False)
    add_TelemetryServiceServicer_to_server(Telling(), server)
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def test_both_clients_ask() -> None:
    def sync(address: str) -> GetStatisticsResponse:
        with Client(address) as client:
            return client.statistics(timeout=5.0)

    async with telling() as address:
        async with AsyncClient(address) as client:
            assert await client.statistics(timeout=5.0) == figures(10)
        assert await asyncio.to_thread(sync, address) == figures(20)


async def run(*arguments: str) -> tuple[int, str, str]:
    """Runs the command without a terminal to its end."""
    async with telling() as address:
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "--interval", "0.1", "--server", address, *arguments, stdout=-1, stderr=-1, stdin=-3
        )
        async with asyncio.timeout(20):
            output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def test_without_a_terminal_one_overview_is_printed() -> None:
    status, output, errors = await run()
    assert (status, errors) == (0, "")
    assert re.match(r"fermata 127\.0\.0\.1:\d+ · 1 tokenizer · last 0\.\d s\n", output)
    assert "between tokens  5.0 ms" in output
    assert "\\x1b[31m:1" in output


async def test_json_once() -> None:
    status, output, errors = await run("--json", "--once")
    (line,) = output.splitlines()
    assert (status, errors) == (0, "")
    assert json.loads(line)["token_latency"]["count"] == 10


async def test_json_goes_on_until_ctrl_c() -> None:
    async with telling() as address:
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "--json", "--interval", "0.1", "--server", address, stdout=-1, stderr=-1
        )
        assert process.stdout is not None
        async with asyncio.timeout(20):
            counts = [json.loads(await process.stdout.readline())["token_latency"]["count"] for _ in range(3)]
            process.send_signal(signal.SIGINT)
            _, errors = await process.communicate()
    assert (counts, process.returncode, errors) == ([10, 10, 10], 0, b"")


@pytest.mark.parametrize("interval", ["0", "-1", "soon", "nan"])
async def test_an_interval_needs_length(interval: str) -> None:
    status, _, errors = await run("--interval", interval)
    assert status == 2
    assert "seconds from 0.1 to 3600 are needed" in errors


class Terminal:
    """A terminal in which the command runs.

    Attributes:
        shown: all that was written to it.
    """

    def __init__(self, address: str) -> None:
        self.shown = ""
        self._ours, self._theirs = pty.openpty()
        self.resize(90, 30)
        self.before = termios.tcgetattr(self._theirs)
        start = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, *COMMAND, "--interval", "0.2", "--server", address],
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def settings(self) -> list[Any]:
        return termios.tcgetattr(self._theirs)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait_for(self, wanted: str) -> None:
        """Reads until a text has come; what came before is forgotten."""
        end = time.monotonic() + 20
        while wanted not in self.shown:
            assert select.select([self._ours], [], [], max(0.0, end - time.monotonic()))[0], self.shown
            self.shown += os.read(self._ours, 65536).decode(errors="replace")
        self.shown = self.shown.partition(wanted)[2]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self._ours)
        os.close(self._theirs)


@contextmanager
def terminal(address: str) -> Iterator[Terminal]:
    opened = Terminal(address)
    try:
        yield opened
    finally:
        opened.close()


@pytest.mark.parametrize("key", ["q", "\x03", "\x04"], ids=["q", "Ctrl-C", "Ctrl-D"])
async def test_in_a_terminal_the_screen_is_drawn_in_place(key: str) -> None:
    def use(address: str) -> None:
        with terminal(address) as opened:
            opened.wait_for("\x1b[?1049h")
            opened.wait_for("the first figures come after one interval")
            opened.wait_for("\x1b[H")
            opened.wait_for("between tokens  5.0 ms")
            opened.wait_for("\\x1b[31m:1")
            opened.resize(20, 30)
            opened.wait_for("fermata 127.0.0.1:…")
            opened.type("x\x1b[A")
            opened.wait_for("\x1b[J")
            opened.type(key)
            opened.wait_for("\x1b[?1049l")
            _, errors = opened.process.communicate(timeout=20)
            assert (opened.process.returncode, errors) == (0, "")
            assert opened.settings == opened.before

    async with telling() as address:
        await asyncio.to_thread(use, address)


async def test_a_server_that_is_gone_is_waited_for() -> None:
    context = telling()
    address = await context.__aenter__()
    with terminal(address) as opened:
        await asyncio.to_thread(opened.wait_for, "between tokens  5.0 ms")
        await context.__aexit__(None, None, None)
        await asyncio.to_thread(opened.wait_for, "no answer, the figures are old: ")
        await asyncio.to_thread(opened.wait_for, "between tokens  5.0 ms")
        opened.type("q")
        await asyncio.to_thread(opened.wait_for, "\x1b[?1049l")
        assert opened.process.wait(20) == 0
