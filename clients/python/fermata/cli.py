"""The terminal client `fermata`.

Knows the command line and the environment (`FERMATA_SERVER`, `NO_COLOR`); what is said to the server is the library's.
Exit status: 0 when finished, 2 for a usage error, 1 with the reason on standard error otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from fermata.aio import AsyncClient
from fermata.aio_drift import measure_drift
from fermata.chat import ChatEnd, run_chat
from fermata.client import Client
from fermata.dialing import DEFAULT_SERVER, parse_server
from fermata.drift import DriftCurve, DriftText, read_texts
from fermata.errors import DataLoss, FermataError, Unavailable
from fermata.events import FinishReason
from fermata.printing import (
    EventPrinter,
    Printer,
    Stopwatch,
    drift_json,
    drift_rows,
    drift_summary,
    finish_notes,
    generation_rows,
    local_time,
    piece_rows,
    session_rows,
)
from fermata.requests import Options
from fermata.sync_stream import Stream
from fermata.top import add_top_options, show_top
from fermata.trace_command import add_trace_options, show_trace
from fermata.v1 import text_pb2

__all__ = ["ChatEnd", "main", "run_chat"]

FIRST_CONTACT = 5.0
"""Seconds that a command waits for a server to be there; a stream that has begun is patient for longer."""

FINISHED, FAILED, USAGE = 0, 1, 2


class UsageError(Exception):
    """The command line asks for something that cannot be."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    given = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a narrow terminal encoding must not end a stream
    printer = Printer()
    run: Callable[[argparse.Namespace, Printer], int] = given.run
    try:
        return run(given, printer)
    except UsageError as error:
        printer.failure(str(error))
        return USAGE
    except UnicodeError:
        printer.failure("the text is not UTF-8")
        return USAGE
    except FermataError as error:
        printer.failure(error)
        return FAILED
    except KeyboardInterrupt:
        printer.failure("interrupted")
        return FAILED
    except BrokenPipeError:
        # Who read the output has left. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def generate(given: argparse.Namespace, printer: Printer) -> int:
    """Continues a prompt, or answers a message."""
    text = _text(given.prompt)
    if given.system is not None and not given.chat:
        raise UsageError("--system goes with --chat")
    options = _options(given)
    if given.session:
        options["session_id"] = given.session
    if given.detach:
        options["detach"] = True
    if given.chat:
        system = [] if given.system is None else [{"role": "system", "content": given.system}]
        options["messages"] = [*system, {"role": "user", "content": text}]
    prompt = None if given.chat else text
    with _connected(given) as client:
        if given.timings:
            options["timings"] = True
        return _show(client.stream(prompt, **options), given, printer)


def chat(given: argparse.Namespace, printer: Printer) -> int:
    """Talks on the terminal."""
    with _connected(given):
        pass
    end = run_chat(
        given.server,
        system=given.system,
        session_id=given.session or "",
        options=_options(given),
        as_json=given.json,
        timings=given.timings,
        printer=printer,
    )
    return FAILED if end is ChatEnd.FAILED else FINISHED


def resume(given: argparse.Namespace, printer: Printer) -> int:
    """Reads a generation on."""
    cursors = {0: given.count} if given.count else None
    with _connected(given) as client:
        return _show(client.resume(given.generation, cursors=cursors), given, printer, leaves=True)


def tokens(given: argparse.Namespace, printer: Printer) -> int:
    """Shows the tokens of a text."""
    text = _text(given.text)
    with _connected(given) as client:
        pieces = client.tokenize(text, parse_special=given.special)
    if given.json:
        messages = [
            text_pb2.TokenPiece(token_id=item.token_id, piece=item.piece, special=item.special) for item in pieces
        ]
        printer.json(text_pb2.TokenizeResponse(tokens=messages))
    else:
        printer.table(("PIECE", "ID", "SPECIAL"), piece_rows(pieces))
    return FINISHED


def drift(given: argparse.Namespace, printer: Printer) -> int:
    """Shows how a model's errors grow along texts when it goes on from its own tokens."""
    texts = _drift_texts(given)
    with _connected(given):
        pass

    async def measure() -> DriftCurve:
        async with AsyncClient(given.server) as client:
            return await measure_drift(client, texts, longest=given.longest, progress=printer.progress)

    try:
        curve = asyncio.run(measure())
    finally:
        printer.end_progress()
    if given.json:
        printer.line(drift_json(curve))
        return FINISHED
    heading = ("OFFSETS", "TOKENS", "TEACHER-FORCED", "", "FREE-RUNNING", "", "GAP")
    printer.table(heading, drift_rows(curve))
    printer.line(drift_summary(curve))
    return FINISHED


def trace(given: argparse.Namespace, printer: Printer) -> int:
    """Shows where the time of each token of a generation went."""
    return show_trace(lambda: _connected(given), given, printer)


def top(given: argparse.Namespace, printer: Printer) -> int:
    """Shows what the system does now."""
    with _connected(given) as client:
        return show_top(client, given, printer)


def list_sessions(given: argparse.Namespace, printer: Printer) -> int:
    """Lists sessions."""
    with _connected(given) as client:
        sessions = client.list_sessions(limit=given.limit)
    if given.json:
        for session in sessions:
            printer.json(session.message)
    else:
        printer.table(("SESSION", "STATE", "GENERATIONS", "OPENED", "EXPIRES"), session_rows(sessions))
    return FINISHED


def show_session(given: argparse.Namespace, printer: Printer) -> int:
    """Shows one session with its generations."""
    with _connected(given) as client:
        session = client.get_session(given.session)
    if given.json:
        printer.json(session.message)
        return FINISHED
    printer.line(f"session {session.session_id}: {session.state.name.lower()}")
    printer.line(f"opened {local_time(session.create_time)}, expires {local_time(session.expire_time)}")
    for name, value in session.labels.items():
        printer.line(f"label {name} = {value}")
    printer.line()
    heading = ("GENERATION", "GOES ON FROM", "PROMPT", "OUTPUT", "ENDED BY", "OPENED")
    printer.table(heading, generation_rows(session))
    return FINISHED


def _show(stream: Stream, given: argparse.Namespace, printer: Printer, *, leaves: bool = False) -> int:
    """Shows a stream to its end. Ctrl-C cancels the generation; with `leaves`, or a detached one, it lets it be."""
    shown = EventPrinter(printer, as_json=given.json)
    watch = Stopwatch()
    end = stream.leave if leaves else stream.close

    def way_on() -> str:
        return f"go on with `fermata resume {stream.generation_id} --count {stream.cursors.get(0, 0)}`"

    try:
        for event in stream:
            shown.event(event)
            watch.event(event)
    except KeyboardInterrupt:
        end()
        shown.end(stream)
        printer.failure(f"left; {way_on()}" if stream.started and (leaves or given.detach) else "cancelled")
        return FAILED
    except FermataError as error:
        shown.end(stream)
        if stream.started and not isinstance(error, DataLoss):
            error.add_note(way_on())
        raise
    finally:
        end()  # when whoever read the output has left
    shown.end(stream)
    if given.timings:
        watch.report(printer)
    ends = [choice.finished for choice in stream.result().choices if choice.finished]
    for note in finish_notes(ends):
        printer.failure(note)
    return FAILED if any(end.finish_reason is FinishReason.ERROR for end in ends) else FINISHED


@contextlib.contextmanager
def _connected(given: argparse.Namespace) -> Iterator[Client]:
    """A client whose server was there a moment ago."""
    with Client(given.server) as client:
        try:
            client.wait_until_ready(FIRST_CONTACT)
        except Unavailable as error:
            advice = "start one with `fermata-server up`, or name another with --server"
            raise Unavailable(f"{error.message}; {advice}") from error
        yield client


def _text(argument: str | None) -> str:
    """The text of a positional argument; `-` or nothing reads a pipe."""
    if argument is not None and argument != "-":
        return argument
    if sys.stdin.isatty():
        raise UsageError("a text is needed, as an argument or from a pipe")
    return sys.stdin.read()


def _drift_texts(given: argparse.Namespace) -> list[DriftText]:
    """The texts of a file of JSON lines; `-` reads standard input."""
    try:
        with (
            contextlib.nullcontext(sys.stdin) if given.file == "-" else Path(given.file).open(encoding="utf-8") as lines
        ):
            return read_texts(lines, limit=given.limit)
    except UnicodeError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"{given.file}: {getattr(error, 'strerror', None) or error}") from error


def _options(given: argparse.Namespace) -> Options:
    """The sampling and stopping options of the command line."""
    options = {
        name: getattr(given, name)
        for name in ("temperature", "top_k", "top_p", "min_p", "seed", "n", "max_tokens", "stop")
        if getattr(given, name) is not None
    }
    if given.greedy:
        options["temperature"] = 0.0
    return cast(Options, options)


def _parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="fermata",
        description="Generates text on a Fermata server and goes on where it stopped.",
        allow_abbrev=False,
    )
    server = os.environ.get("FERMATA_SERVER") or DEFAULT_SERVER
    _add_common(parser, server, False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _command(commands, "generate", generate, "continue a prompt, or answer a message with --chat")
    command.add_argument("prompt", nargs="?", help="the text; - or nothing reads standard input")
    command.add_argument("--chat", action="store_true", help="make the text the user's message of a conversation")
    command.add_argument("--detach", action="store_true", help="let the generation go on when this command ends")
    _add_generation(command)

    command = _command(commands, "chat", chat, "talk; Ctrl-C cancels a reply, Ctrl-D ends")
    _add_generation(command)

    command = _command(commands, "resume", resume, "read a generation on, and continue it where it was left")
    command.add_argument("generation", metavar="GENERATION_ID")
    command.add_argument("--count", type=_count, default=0, help="tokens of choice 0 already seen (default: 0)")
    command.add_argument("--timings", action="store_true", help="tell where the time went")

    command = _command(commands, "tokens", tokens, "show the tokens of a text")
    command.add_argument("text", nargs="?", help="the text; - or nothing reads standard input")
    command.add_argument("--special", action="store_true", help="take control tokens in the text as such")

    command = _command(commands, "drift", drift, "measure how errors grow when a model goes on from its own tokens")
    command.add_argument("file", metavar="FILE", help="conversations as JSON lines; - reads standard input")
    command.add_argument("--limit", type=_positive, help="most conversations to take (default: all)")
    command.add_argument("--longest", type=_positive, default=64, help="most tokens of each answer (default: 64)")

    add_trace_options(_command(commands, "trace", trace, "show where the time of each token of a generation went"))
    add_top_options(_command(commands, "top", top, "show what the system does now; q ends"))

    sessions = commands.add_parser("sessions", help="look at sessions").add_subparsers(required=True, metavar="COMMAND")
    command = _command(sessions, "list", list_sessions, "list sessions, the newest first")
    command.add_argument("--limit", type=_count, default=50, help="most sessions to list (default: 50)")
    command = _command(sessions, "show", show_session, "show a session with its generations")
    command.add_argument("session", metavar="SESSION_ID")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace, Printer], int], description: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=description, description=description, allow_abbrev=False
    )
    command.set_defaults(run=run, detach=False)
    _add_common(command, argparse.SUPPRESS, argparse.SUPPRESS)
    return command


def _add_common(parser: argparse.ArgumentParser, server: str, as_json: object) -> None:
    """Flags that stand before or after the command; the command's suppress their defaults, not to undo the other's."""
    parser.add_argument(
        "--server",
        type=_server,
        default=server,
        metavar="HOST:PORT",
        help=f"the server (default: FERMATA_SERVER or {DEFAULT_SERVER})",
    )
    parser.add_argument("--json", action="store_true", default=as_json, help="print JSON, one line per event or thing")


def _add_generation(command: argparse.ArgumentParser) -> None:
    """Flags of everything that generates."""
    temperature = command.add_mutually_exclusive_group()
    temperature.add_argument("--greedy", action="store_true", help="always the most probable token")
    temperature.add_argument("--temperature", type=float, help="0 is --greedy")
    command.add_argument("--top-k", type=_count, help="keep the k most probable tokens; 0 keeps all")
    command.add_argument("--top-p", type=float, help="keep tokens while the mass before each is below")
    command.add_argument("--min-p", type=float, help="keep tokens of at least this share of the highest probability")
    command.add_argument("--seed", type=_seed, help="the same seed gives the same tokens")
    command.add_argument("--n", type=_count, help="number of choices")
    command.add_argument("--max-tokens", type=_count, help="most output tokens (default: the rest of the context)")
    command.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be repeated")
    command.add_argument("--session", metavar="SESSION_ID", help="go on from this session")
    command.add_argument("--system", metavar="TEXT", help="instructions before the conversation")
    command.add_argument("--timings", action="store_true", help="tell where the time went")


def _server(text: str) -> str:
    try:
        return parse_server(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    return _whole(text, 32)


def _positive(text: str) -> int:
    if not (number := _count(text)):
        raise argparse.ArgumentTypeError("at least 1 is needed")
    return number


def _seed(text: str) -> int:
    return _whole(text, 64)


def _whole(text: str, bits: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << bits:
        raise argparse.ArgumentTypeError(f"a whole number from 0 to {(1 << bits) - 1} is needed, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
