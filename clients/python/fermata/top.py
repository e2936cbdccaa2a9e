"""`fermata top`: what the system does now, once per second.

Draws an overview as lines of text for a terminal of any size, and asks for the next one until somebody has seen enough.
What the figures mean is told by `statistics.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

from fermata.client import Client
from fermata.errors import FermataError
from fermata.parts import PARTS, duration
from fermata.printing import BOLD, DIM, RED, Printer, bar, describe
from fermata.screen import Happened, Line, full_screen
from fermata.statistics import (
    Latency,
    Load,
    OrchestratorLoad,
    Overview,
    ReplicaOverview,
    ShardLoad,
    TokenizerLoad,
    overview,
)
from fermata.v1 import telemetry_pb2

SERVICES = ("tokenizer", "orchestrator", "shard")
ANSWER_WITHIN = 2.0
"""Seconds that the server has for an answer while a screen waits for it."""
PLAIN_WIDTH = 100
"""Columns where there is no terminal."""
_BAR, _KV_BAR = 20, 10
_FEWEST_PARTS = 3
_NOTHING = "-"


def add_top_options(command: argparse.ArgumentParser) -> None:
    """Declares the flags of the command."""
    command.add_argument("--interval", type=_seconds, default=1.0, metavar="SECONDS", help="between two looks (1)")
    command.add_argument("--once", action="store_true", help="show one interval and end; so it is without a terminal")


def show_top(client: Client, given: argparse.Namespace, printer: Printer) -> int:
    """Runs the command; returns its exit status, always 0.

    Raises:
        FermataError: the server did not answer, where nobody watches a screen.
    """
    looks = Looks(client.statistics)
    if given.json:
        _write_json(looks, given.interval, given.once, printer)
    elif given.once or not printer.output.isatty():
        looks.next()
        time.sleep(given.interval)
        width = shutil.get_terminal_size((PLAIN_WIDTH, 0)).columns
        for line in draw(looks.next(), given.server, width):
            printer.line(line.text, line.style)
    else:
        _watch(looks, given.interval, given.server, printer)
    return 0


class Looks:
    """The counters of a system, looked at again and again."""

    def __init__(
        self,
        ask: Callable[..., telemetry_pb2.GetStatisticsResponse],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ask` takes a `timeout` in seconds and returns the counters; `clock` gives seconds."""
        self._ask = ask
        self._clock = clock
        self._last: tuple[telemetry_pb2.GetStatisticsResponse, float] | None = None

    def next(self, timeout: float | None = None) -> Overview | None:
        """What was done since the look before; None at the first one.

        Raises:
            FermataError: no answer; the next look goes back to the last that had one.
        """
        answer, now = self._ask(timeout=timeout), self._clock()
        last, self._last = self._last, (answer, now)
        return overview(last[0], answer, now - last[1]) if last else None


def as_json(shown: Overview, moment: datetime) -> str:
    """An overview as one line of JSON: the names of its attributes, times in seconds, `time` in RFC 3339."""
    stamp = moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"time": stamp, **dataclasses.asdict(shown)})


def draw(shown: Overview | None, server: str, width: int, height: int | None = None) -> list[Line]:
    """An overview as a screen of text.

    Args:
        shown: None while there is none yet.
        server: HOST:PORT, for the title.
        width: most columns of a line.
        height: most lines; None for all of them.
    """
    if shown is None:
        lines = [Line(f"fermata {server}", BOLD), Line("the first figures come after one interval", DIM)]
    else:
        lines = [*_summary(shown, server, width), *_replicas(shown.replicas, width)]
        room = len(PARTS) if height is None else max(_FEWEST_PARTS, height - len(lines) - 2)
        lines += _parts(shown, room)
    if height is not None and len(lines) > height:
        hidden = len(lines) - height + 1
        lines = [*lines[: height - 1], Line(f"… {hidden} more lines; a higher terminal shows them", DIM)]
    return [line._replace(text=_cut(line.text, width)) for line in lines]


def _write_json(looks: Looks, interval: float, once: bool, printer: Printer) -> None:
    try:
        while True:
            shown = looks.next()
            if shown is not None:
                printer.line(as_json(shown, datetime.now(UTC)))
                if once:
                    return
            time.sleep(interval)
    except KeyboardInterrupt:
        if once:
            raise


def _watch(looks: Looks, interval: float, server: str, printer: Printer) -> None:
    """Draws a screen per interval until a key or Ctrl-C ends it. A server that does not answer is waited for."""
    shown: Overview | None = None
    with full_screen(printer.output) as screen:
        try:
            while True:
                trouble = []
                due = time.monotonic() + interval
                try:
                    shown = looks.next(max(ANSWER_WITHIN, interval)) or shown
                except FermataError as error:
                    trouble = [Line(f"no answer, the figures are old: {describe(error)}", RED)]
                happened = Happened.RESIZED
                while happened is not Happened.NOTHING or time.monotonic() < due:
                    if happened is Happened.QUIT:
                        return
                    if happened is Happened.RESIZED:
                        width, height = screen.size
                        lines = draw(shown, server, width, max(1, height - len(trouble)))
                        screen.show([*(Line(_cut(text, width), style) for text, style in trouble), *lines][:height])
                    happened = screen.wait(due - time.monotonic())
        except KeyboardInterrupt:
            return


def _summary(shown: Overview, server: str, width: int) -> Iterator[Line]:
    there = Counter(replica.service for replica in shown.replicas)
    services = [f"{count} {name}{'s' if count > 1 else ''}" for name, count in sorted(there.items(), key=_order)]
    yield Line(" · ".join([f"fermata {server}", *(services or ["no process answers"]), _seconds_long(shown)]), BOLD)
    rates = [
        f"{shown.tokens_per_second:,.1f} tokens/s",
        f"{shown.streams} stream{'' if shown.streams == 1 else 's'}",
        f"{shown.requests_per_second:,.1f} requests/s",
        f"{shown.failed_per_second:,.1f} failed/s",
    ]
    yield from _flow(rates, width)
    yield Line("")
    rows = [("between tokens", *_times(shown.token_latency)), ("first token", *_times(shown.time_to_first_token))]
    yield from _table(("LATENCY", "P50", "P90", "P99", "MEAN", "COUNT"), rows, width)


def _replicas(replicas: Sequence[ReplicaOverview], width: int) -> Iterator[Line]:
    """A table for each service. What matters most stands on the left: a narrow terminal drops columns on the right."""
    headings: dict[type[Load], tuple[str, ...]] = {
        TokenizerLoad: ("TOKENIZER", "TOKENS/S", "STREAMS"),
        OrchestratorLoad: ("ORCHESTRATOR", "GENERATIONS", "COMMIT P50", "P99", "STORE/TOKEN", "TAKEOVERS"),
        ShardLoad: ("SHARD", "RUNNING", "WAITING", f"KV{'':{_KV_BAR + 4}}", "BATCH", "STEP", "PREFIX"),
    }
    for kind, heading in headings.items():
        rows = [
            (replica.address, *_load(load), _percent(replica.cpu), _memory(replica.memory), str(replica.pid))
            for replica in replicas
            if isinstance(load := replica.load, kind)
        ]
        if rows:
            yield Line("")
            yield from _table((*heading, "CPU", "MEMORY", "PID"), rows, width)


def _load(load: Load) -> tuple[str, ...]:
    if isinstance(load, TokenizerLoad):
        return f"{load.tokens_per_second:,.1f}", str(load.streams)
    if isinstance(load, OrchestratorLoad):
        lag = load.commit_lag
        return (
            str(load.generations),
            "CUT OFF" if load.cut_off else _time(lag.p50 if lag else None),
            _time(lag.p99 if lag else None),
            _number(load.store_calls_per_token, ".3f"),
            str(load.takeovers),
        )
    usage = f"{bar(load.kv_usage, _KV_BAR):<{_KV_BAR}} {_percent(load.kv_usage):>5}"
    return (
        str(load.running),
        str(load.waiting),
        usage,
        _number(load.batch_mean, ".1f"),
        _time(load.step_mean),
        _percent(load.prefix_hit_share),
    )


def _parts(shown: Overview, room: int) -> Iterator[Line]:
    """The parts of a token's time in the order in which it goes through them; what has no room is put together."""
    yield Line("")
    if not shown.parts:
        yield Line("no token followed another one in this interval", DIM)
        return
    yield Line("WHERE THE TIME BETWEEN TWO TOKENS GOES", BOLD)
    some = [part for part, share in shown.parts.items() if share >= 0.0005]
    largest = sorted(some, key=lambda part: -shown.parts[part])
    kept = set(largest if len(some) <= room else largest[: room - 1])
    for part in some:
        if part in kept:
            told = PARTS[part]
            yield Line(f"{_share(told.title, shown.parts[part])}  {told.place.value + ':':<14}{told.description}")
    if len(kept) < len(some):
        yield Line(_share("others", sum(shown.parts[part] for part in some if part not in kept)))


def _share(title: str, share: float) -> str:
    return f"{title:<12} {bar(share, _BAR):<{_BAR}} {share * 100:>5.1f} %"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[Line]:
    """Rows under a heading, names on the left and figures on the right; columns that do not fit are left out."""
    cells = [heading, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heading))]
    while len(widths) > 1 and sum(widths) + 2 * (len(widths) - 1) > width:
        widths.pop()
    for index, row in enumerate(cells):
        fitted = zip(row, widths, strict=False)
        padded = [f"{cell:>{size}}" if place else f"{cell:<{size}}" for place, (cell, size) in enumerate(fitted)]
        yield Line("  ".join(padded).rstrip(), "" if index else BOLD)


def _flow(items: Sequence[str], width: int) -> Iterator[Line]:
    """Items in as few lines as they need."""
    line = ""
    for item in items:
        if line and len(line) + len(item) + 3 > width:
            yield Line(line)
            line = item
        else:
            line = f"{line} · {item}" if line else item
    yield Line(line)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _order(item: tuple[str, int]) -> tuple[int, str]:
    """As a token's request goes through the services; those that are not known here come last."""
    return SERVICES.index(item[0]) if item[0] in SERVICES else len(SERVICES), item[0]


def _seconds_long(shown: Overview) -> str:
    return f"last {shown.seconds:.1f} s"


def _times(latency: Latency | None) -> tuple[str, ...]:
    if latency is None:
        return _NOTHING, _NOTHING, _NOTHING, _NOTHING, "0"
    return *(_time(item) for item in (latency.p50, latency.p90, latency.p99, latency.mean)), str(latency.count)


def _time(seconds: float | None) -> str:
    return _NOTHING if seconds is None else duration(seconds * 1e6)


def _percent(share: float | None) -> str:
    return _NOTHING if share is None else f"{share * 100:.0f} %"


def _number(value: float | None, form: str) -> str:
    return _NOTHING if value is None else f"{value:{form}}"


def _memory(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"seconds from 0.1 to 3600 are needed, not {text!r}")
    return seconds
