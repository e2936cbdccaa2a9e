"""A conversation on a terminal, or line by line from a pipe.

Knows the library and the keyboard. What a session is made of is the server's business: each turn names the session of
the one before and sends its new messages alone.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from typing import TextIO

from fermata.client import Client
from fermata.errors import FermataError
from fermata.printing import EventPrinter, Printer, Stopwatch, finish_notes
from fermata.requests import Options
from fermata.sync_stream import Stream

PROMPT = "> "


class ChatEnd(enum.IntEnum):
    """How a conversation ended."""

    END_OF_INPUT = 0
    """Ctrl-D at the prompt, or the end of a pipe."""
    FAILED = 1
    """A reply failed and nobody is there to go on (input from a pipe)."""
    INTERRUPTED = 130
    """Ctrl-C at the prompt."""


def run_chat(
    server: str,
    *,
    system: str | None = None,
    session_id: str = "",
    options: Options | None = None,
    as_json: bool = False,
    timings: bool = False,
    source: TextIO | None = None,
    printer: Printer | None = None,
) -> ChatEnd:
    """Talks until the input ends. Runs in the main thread with Python's own SIGINT handler, or one that raises.

    Ctrl-C cancels a reply that runs and goes on; at the prompt it ends the conversation, as Ctrl-D does. After a
    reply that failed the conversation goes on where a person types, and ends where a program does.

    Args:
        server: HOST:PORT.
        system: instructions before the first message.
        session_id: a session to go on from.
        options: sampling, stopping and the like for every turn.
        as_json: print events as JSON lines.
        timings: tell after each reply where the time went.
        source: where lines come from; standard input by default.
        printer: where replies go; standard output and error by default.

    Returns:
        How it ended.
    """
    source = source or sys.stdin
    printer = printer or Printer()
    with Client(server) as client:
        conversation = Conversation(client, printer, options or {}, system, session_id)
        while True:
            try:
                line = _read_line(source)
            except KeyboardInterrupt:
                printer.line()
                return ChatEnd.INTERRUPTED
            if line is None:
                if source.isatty():
                    printer.line()
                return ChatEnd.END_OF_INPUT
            if not line.strip():
                continue
            try:
                answered = conversation.turn(line, as_json, timings)
            except KeyboardInterrupt:  # between two steps of the turn
                continue
            if not answered and not source.isatty():
                return ChatEnd.FAILED


class Conversation:
    """The turns of one session."""

    def __init__(self, client: Client, printer: Printer, options: Options, system: str | None, session_id: str) -> None:
        self._client = client
        self._printer = printer
        self._options = options
        self._system = system
        self._session_id = session_id

    def turn(self, text: str, as_json: bool, timings: bool) -> bool:
        """Says `text` and shows the reply; returns False when the reply failed."""
        messages = [{"role": "user", "content": text}]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": self._system})
        options: Options = {**self._options, "messages": messages, "session_id": self._session_id}
        shown = EventPrinter(self._printer, as_json=as_json)
        watch = Stopwatch()
        with self._client.stream(**options) as stream:
            try:
                for event in stream:
                    self._began(stream)
                    shown.event(event)
                    watch.event(event)
            except KeyboardInterrupt:
                # A second Ctrl-C gives up waiting for the cancel; the server parks what nobody reads.
                with contextlib.suppress(KeyboardInterrupt):
                    stream.close()
                shown.end(stream)
                self._printer.note("cancelled")
                return True
            except FermataError as error:
                shown.end(stream)
                self._printer.failure(error)
                return False
        shown.end(stream)
        for note in finish_notes([choice.finished for choice in stream.result().choices if choice.finished]):
            self._printer.failure(note)
        if timings:
            watch.report(self._printer)
        return True

    def _began(self, stream: Stream) -> None:
        """The turn is in a session from its first event on, and its messages need not be sent again."""
        if stream.session_id:
            self._session_id = stream.session_id
            self._system = None


def _read_line(source: TextIO) -> str | None:
    """The next line; None at the end. A terminal shows a prompt and has line editing."""
    if source is not sys.stdin or not source.isatty():
        line = source.readline()
        return line.removesuffix("\n") if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415 - gives `input` its history and editing
    try:
        return input(PROMPT)
    except EOFError:
        return None
