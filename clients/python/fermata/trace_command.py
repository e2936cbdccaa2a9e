"""`fermata trace`: where the time of each token of a generation went, as text, as a page, or as the document itself.

Knows the command line and files. What is drawn is decided in `waterfall.py` and `trace_page.py`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from fermata.client import Client
from fermata.printing import Printer
from fermata.trace import read_trace
from fermata.trace_page import trace_page
from fermata.waterfall import waterfall


def add_trace_options(command: argparse.ArgumentParser) -> None:
    """Declares the arguments of the command."""
    command.add_argument("generation", nargs="?", default="", metavar="GENERATION_ID", help="which generation")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page for a browser instead")
    command.add_argument(
        "--file",
        type=_document,
        metavar="FILE",
        help="draw this document in OTLP/JSON and ask no server; - reads a pipe",
    )
    command.set_defaults(usage_error=command.error)


def show_trace(
    connect: Callable[[], AbstractContextManager[Client]], given: argparse.Namespace, printer: Printer
) -> int:
    """Runs the command; returns its exit status.

    Raises:
        FermataError: what the server said.
    """
    document: bytes | None = given.file
    if document is None:
        if not given.generation:
            given.usage_error("the id of a generation is needed, or a document with --file")
        with connect() as client:
            document = client.trace(given.generation)
    try:
        trace = read_trace(document, given.generation)
    except ValueError as error:
        if given.file is not None:
            given.usage_error(str(error))
        printer.failure(str(error))
        return 1
    if given.html is not None:
        try:
            given.html.write_text(trace_page(trace), encoding="utf-8")
        except OSError as error:
            printer.failure(f"{given.html}: {error.strerror}")
            return 1
        printer.note(f"wrote {given.html}")
    elif given.json:
        printer.line(document.decode())
    else:
        for line in waterfall(trace, shutil.get_terminal_size().columns):
            printer.line(line.text, line.style)
    return 0


def _document(name: str) -> bytes:
    """The content of a file; `-` is standard input."""
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error.strerror}") from None
