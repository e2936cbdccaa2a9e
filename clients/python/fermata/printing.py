"""What the terminal client writes: events as text or JSON, tables, errors in one line.

Knows streams of text and the library's values; asks nobody anything. Colours and visible control characters are for
terminals only, so that what a program reads is what was generated.
"""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TextIO

from google.protobuf import json_format
from google.protobuf.message import Message

from fermata.drift import DriftCurve, DriftSpan
from fermata.errors import FermataError
from fermata.events import Event, Finished, FinishReason, Started, Tokens
from fermata.records import Session, SessionGeneration, TokenPiece
from fermata.stream import StreamState
from fermata.timings import PARTS, TokenTimings

BOLD, DIM, RED, RESET = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[0m"

# A model must not steer the terminal: control characters but for new lines and tabs are shown, not sent.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

_HINTS: Mapping[str, str] = {
    "SESSION_BUSY": "wait for it, or cancel it",
    "SESSION_NOT_FOUND": "sessions are forgotten when they are not used; `fermata sessions list` shows those there are",
    "GENERATION_NOT_FOUND": "its session may have expired; `fermata sessions list` shows those there are",
    "CONTEXT_LENGTH": "shorten the prompt or open a new session",
    "NO_CHAT_TEMPLATE": "use `fermata generate` without --chat",
    "OVERLOADED": "try again later",
    "NEED_FROM": "resume without --count",
}


class Printer:
    """Standard output and standard error of one command."""

    def __init__(self, output: TextIO | None = None, errors: TextIO | None = None) -> None:
        """Writes to `output` and `errors`, the process's own by default; `NO_COLOR` forbids colours."""
        self.output = output or sys.stdout
        self.errors = errors or sys.stderr
        plain = "NO_COLOR" in os.environ
        self._output_is_terminal = self.output.isatty()
        self._colours = {stream: stream.isatty() and not plain for stream in (self.output, self.errors)}

    def text(self, text: str) -> None:
        """Writes text as it comes, at once."""
        if text:
            self.output.write(text.translate(_CONTROLS) if self._output_is_terminal else text)
            self.output.flush()

    def line(self, text: str = "", style: str = "") -> None:
        """Writes one line to standard output."""
        self.text_styled(self.output, text, style)

    def note(self, text: str) -> None:
        """Writes one line beside the output."""
        self.text_styled(self.errors, text, DIM)

    def progress(self, done: int, total: int) -> None:
        """Shows on one line of a terminal how far a long command is."""
        if self.errors.isatty():
            print(f"\r{done} of {total}", end="", file=self.errors, flush=True)

    def end_progress(self) -> None:
        """Takes that line away."""
        if self.errors.isatty():
            print("\r\x1b[K", end="", file=self.errors, flush=True)

    def failure(self, error: FermataError | str) -> None:
        """Writes why it did not work, in one line."""
        reason = error if isinstance(error, str) else describe(error)
        self.text_styled(self.errors, f"fermata: {' '.join(reason.split())}", RED)

    def json(self, message: Message) -> None:
        """Writes a message as one line of proto3 JSON, names and defaults as in the proto."""
        text = json_format.MessageToJson(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, indent=None
        )
        print(text, file=self.output, flush=True)

    def table(self, heading: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Writes columns that are as wide as what is in them."""
        cells = [heading, *rows]
        widths = [max(display_width(row[column]) for row in cells) for column in range(len(heading))]
        for index, row in enumerate(cells):
            padded = [cell + " " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True)]
            self.line("  ".join(padded).rstrip(), BOLD if index == 0 else "")

    def text_styled(self, stream: TextIO, text: str, style: str) -> None:
        """Writes one line with a style where the stream is a terminal."""
        text = text.translate(_CONTROLS)
        print(f"{style}{text}{RESET}" if style and self._colours[stream] else text, file=stream, flush=True)


class EventPrinter:
    """Shows the events of one stream: JSON lines, or the text of one choice as it comes, or several at the end."""

    def __init__(self, printer: Printer, *, as_json: bool = False) -> None:
        self._printer = printer
        self._as_json = as_json
        self._announced = False
        self._n = 1
        self._last = "\n"

    def event(self, event: Event) -> None:
        """Shows one event."""
        if type(event) is Started:
            self._n = event.n
            if not self._announced:
                self._printer.note(f"generation {event.generation_id}")
                self._announced = True
        if self._as_json:
            self._printer.json(event.message)
        elif self._n <= 1:
            self._printer.text(event.text)
            self._last = event.text[-1:] or self._last

    def end(self, stream: StreamState) -> None:
        """Shows what waited for the end of the stream, whole or not."""
        if self._as_json or stream.started is None:
            return
        if self._n > 1:
            for choice in stream.result().choices:
                self._printer.line(f"── choice {choice.index}: {choice.finish_reason.name.lower()} ──", BOLD)
                self._printer.text(choice.text if choice.text.endswith("\n") else choice.text + "\n")
        elif self._last != "\n":
            self._printer.text("\n")


class Stopwatch:
    """Where the time of a stream went, as its reader sees it and, when they were asked for, by the token's timings."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._first: float | None = None
        self._tokens = 0
        self._timings: list[TokenTimings] = []

    def event(self, event: Event) -> None:
        """Takes the time of an event."""
        if type(event) is not Tokens:
            return
        self._first = self._first or time.monotonic()
        self._tokens += len(event.token_ids)
        self._timings += event.timings

    def report(self, printer: Printer) -> None:
        """Writes what was found beside the output."""
        end = time.monotonic()
        if self._first is None:
            return
        rest = (self._tokens - 1) / (end - self._first) if self._tokens > 1 and end > self._first else 0.0
        printer.note(f"first token after {(self._first - self._begin) * 1e3:.1f} ms")
        printer.note(f"{self._tokens} tokens in {(end - self._begin) * 1e3:.1f} ms, then {rest:.1f} tokens/s")
        for row in timing_rows(self._timings[1:]):
            printer.note(row)


def timing_rows(timings: Sequence[TokenTimings]) -> list[str]:
    """A table of the parts of some tokens' latency: mean, median, 99th percentile, and a bar of the mean's share."""
    if not timings:
        return []
    rows = [f"{'milliseconds per token':<24}{'mean':>9}{'p50':>9}{'p99':>9}"]
    whole = sum(item.total_ns for item in timings) or 1
    for name in ("total", *PARTS):
        values = sorted(getattr(item, f"{name}_ns") / 1e6 for item in timings)
        mean, middle, high = sum(values) / len(values), values[len(values) // 2], values[-1 - len(values) // 100]
        share = sum(values) * 1e6 / whole
        if max(abs(values[0]), abs(high)) >= 0.0005:
            bar = "█" * round(30 * share) if name != "total" else ""
            rows.append(f"{name.replace('_', ' '):<24}{mean:>9.3f}{middle:>9.3f}{high:>9.3f}  {bar}".rstrip())
    return rows


def describe(error: FermataError) -> str:
    """What went wrong, which fields, why by name, and what to do about it."""
    details = [f"{violation.field}: {violation.description}" for violation in error.violations]
    said_already = any(violation.field in error.message for violation in error.violations)
    parts = [*([] if said_already else [error.message]), *details, *getattr(error, "__notes__", ())]
    sentence = "; ".join(parts)
    reason = error.reason or error.code.name
    hint = _HINTS.get(error.reason)
    return f"{sentence} ({reason})" + (f"; {hint}" if hint else "")


def finish_notes(choices: Iterable[Finished]) -> list[str]:
    """What a reader should know about choices that did not end by themselves."""
    notes = []
    for finished in choices:
        if finished.finish_reason is FinishReason.ERROR:
            why = describe(finished.error) if finished.error else "no reason was given"
            notes.append(f"choice {finished.choice} failed: {why}")
        elif finished.finish_reason is FinishReason.CANCELLED:
            notes.append(f"choice {finished.choice} was cancelled")
    return notes


def piece_rows(pieces: Iterable[TokenPiece]) -> list[tuple[str, str, str]]:
    """Rows of a table of tokens: piece in quotes, id, whether it is a control token."""
    return [(quote(piece.piece), str(piece.token_id), "special" if piece.special else "") for piece in pieces]


def quote(piece: bytes) -> str:
    """Bytes in quotes, readable where they are text: what is not UTF-8 and what cannot be seen is escaped."""
    text = piece.decode("utf-8", errors="backslashreplace")
    escaped = "".join(
        character if character.isprintable() or character == " " else character.encode("unicode_escape").decode()
        for character in text
    )
    return f'"{escaped}"'


def drift_rows(curve: DriftCurve) -> list[tuple[str, ...]]:
    """Rows of a table of errors along texts, one for each range of offsets, with a bar for each share."""
    return [
        (
            str(span.first) if span.first == span.last else f"{span.first}-{span.last}",
            str(span.tokens),
            f"{span.teacher_forced:6.1%}",
            bar(span.teacher_forced, 10),
            f"{span.free_running:6.1%}",
            bar(span.free_running, 10),
            f"{span.gap:+.1%}",
        )
        for span in curve.ranges()
    ]


def drift_summary(curve: DriftCurve) -> str:
    """What the curve comes to, in words."""
    total = curve.total
    return (
        f"of {total.tokens} tokens in {curve.texts} texts the model misses {total.teacher_forced:.1%} when it is given "
        f"the text so far and {total.free_running:.1%} when it goes on from its own: a gap of {total.gap:+.1%}"
    )


def drift_json(curve: DriftCurve) -> str:
    """The curve, offset by offset, as one line of JSON."""

    def counts(span: DriftSpan) -> dict[str, float]:
        return {
            "tokens": span.tokens,
            "teacher_forced_errors": span.teacher_forced_errors,
            "free_running_errors": span.free_running_errors,
            "teacher_forced": span.teacher_forced,
            "free_running": span.free_running,
            "gap": span.gap,
        }

    offsets = [{"offset": span.first, **counts(span)} for span in curve.offsets]
    return json.dumps({"texts": curve.texts, "total": counts(curve.total), "offsets": offsets})


def bar(share: float, columns: int) -> str:
    """A share as a bar of up to so many columns; what is not nothing can be seen."""
    eighths = min(max(round(share * columns * 8), 1 if share > 0 else 0), columns * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].rstrip()


def session_rows(sessions: Iterable[Session]) -> list[tuple[str, ...]]:
    """Rows of a table of sessions."""
    return [
        (
            session.session_id,
            session.state.name.lower(),
            str(session.generation_count),
            local_time(session.create_time),
            local_time(session.expire_time),
        )
        for session in sessions
    ]


def generation_rows(session: Session) -> list[tuple[str, ...]]:
    """Rows of a table of a session's generations."""
    return [
        (
            generation.generation_id,
            _parent(generation, session.session_id),
            str(generation.prompt_tokens),
            " ".join(map(str, generation.output_tokens)),
            " ".join(
                reason.name.lower() if reason is not FinishReason.UNSPECIFIED else "open"
                for reason in generation.finish_reasons
            ),
            local_time(generation.create_time),
        )
        for generation in session.generations
    ]


def _parent(generation: SessionGeneration, session_id: str) -> str:
    """The generation, choice and count that a generation goes on from, without what all of a session have in common."""
    if not generation.parent_generation_id:
        return "-"
    name = generation.parent_generation_id.removeprefix(f"{session_id}.")
    return f"{name}, choice {generation.parent_choice} at {generation.parent_count}"


def local_time(moment: datetime | None) -> str:
    """A moment in the clock of the person who reads."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S") if moment else "-"


def display_width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )
