"""A terminal that shows one screen of text again and again: drawn in place, beside what stood there before.

Knows terminals: the alternate screen, single keys, changes of size. Where there is no such keyboard (input from a pipe,
Windows) only Ctrl-C ends.
"""

from __future__ import annotations

import contextlib
import enum
import io
import os
import select
import shutil
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TextIO

from fermata.printing import Printer

try:
    import termios
    import tty
except ImportError:
    _HAS_KEYS = False
else:
    _HAS_KEYS = True

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
_QUIT = b"qQ\x04"  # with Ctrl-D


class Line(NamedTuple):
    """A line of text and its style, one of those of `printing.py`."""

    text: str
    style: str = ""


class Happened(enum.Enum):
    """Why a wait is over."""

    NOTHING = enum.auto()
    RESIZED = enum.auto()
    QUIT = enum.auto()


class _Frame(io.StringIO):
    """A screen while it is written; it is for a terminal."""

    def isatty(self) -> bool:
        return True


class Screen:
    """The terminal while it shows something. Made by `full_screen`."""

    def __init__(self, output: TextIO, keys: int | None, resized: socket.socket) -> None:
        """`keys` is the descriptor of the keyboard, None without one; `resized` is readable after a change of size."""
        self._output = output
        self._keys = keys
        self._resized = resized

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines that can be used: one less than there are, so that nothing wraps or scrolls."""
        try:
            size = os.get_terminal_size(self._output.fileno())
        except OSError:
            size = shutil.get_terminal_size()
        return max(1, size.columns - 1), max(1, size.lines - 1)

    def show(self, lines: Iterable[Line]) -> None:
        """Draws lines, which must fit, over those before."""
        frame = _Frame()
        printer = Printer(frame)
        for line in lines:
            printer.line(line.text, line.style)
        self._output.write(_HOME + frame.getvalue().replace("\n", f"{_END_OF_LINE}\n") + _END_OF_SCREEN)
        self._output.flush()

    def wait(self, seconds: float) -> Happened:
        """Waits until a key ends it, the terminal changes its size, or the time is over."""
        sources: list[int] = [self._resized.fileno(), *([] if self._keys is None else [self._keys])]
        readable, _, _ = select.select(sources, [], [], max(0.0, seconds))
        if self._keys in readable and self._keys is not None:
            keys = os.read(self._keys, 1024)
            if not keys or any(key in _QUIT for key in keys):
                return Happened.QUIT
        if self._resized.fileno() in readable:
            self._resized.recv(1024)
            return Happened.RESIZED
        return Happened.NOTHING


@contextlib.contextmanager
def full_screen(output: TextIO) -> Iterator[Screen]:
    """Takes the terminal for a screen and gives it back as it was. For the main thread."""
    reading, writing = socket.socketpair()
    with reading, writing, contextlib.ExitStack() as restored:
        writing.setblocking(False)
        if hasattr(signal, "SIGWINCH"):
            handler = signal.signal(signal.SIGWINCH, lambda *_: _wake(writing))
            restored.callback(signal.signal, signal.SIGWINCH, handler)
        keys = sys.stdin.fileno() if _HAS_KEYS and sys.stdin.isatty() else None
        if keys is not None:
            restored.callback(termios.tcsetattr, keys, termios.TCSADRAIN, termios.tcgetattr(keys))
            tty.setcbreak(keys)
        restored.callback(_write, output, _LEAVE)
        _write(output, _ENTER)
        yield Screen(output, keys, reading)


def _wake(writing: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):  # it has been told already
        writing.send(b"\0")


def _write(output: TextIO, text: str) -> None:
    output.write(text)
    output.flush()
