"""The log of a service: one event per line, as text for people or as JSON for programs, with what each event is about.

A handler says once what it works on (`bound`), and every line from inside has it, whoever writes it; a call that is
traced says it by itself. Only ids are bound, and no line may carry text of a prompt or of an answer: whoever logs keeps
to that. Knows no service and no setting.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path

from pythonjsonlogger.json import JsonFormatter

from services.common.tracing import current_call

_FIELDS = {
    "asctime": "timestamp",
    "levelname": "level",
    "service": "service",
    "process": "pid",
    "name": "logger",
    "message": "message",
}
"""Fields of every JSON line, by the names that `logging` has for them."""
_SUBJECTS = ("trace_id", "generation_id", "session_id")

# What a peer sends may stand in a line; it must neither begin another line nor steer a terminal.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    code: f"\\u{code:04x}" for code in (0x2028, 0x2029)
}

_bound: ContextVar[Mapping[str, str]] = ContextVar("what is logged about")


@contextmanager
def bound(*, trace_id: bytes = b"", generation_id: str = "", session_id: str = "") -> Iterator[None]:
    """Adds to every line that is logged inside, in this task and those that it starts, what it is about.

    Args:
        trace_id: 16 bytes; empty keeps what is bound already, as for the others.
        generation_id: of the generation.
        session_id: of its session.
    """
    values = dict(zip(_SUBJECTS, (trace_id.hex(), generation_id, session_id), strict=True))
    token = _bound.set({**_bound.get({}), **{name: value for name, value in values.items() if value}})
    try:
        yield
    finally:
        with suppress(ValueError):  # An abandoned asynchronous generator is closed in another context; its own is gone.
            _bound.reset(token)


class _Subjects(logging.Filter):
    """Gives each record the service and what it is about; what a record says by itself stands."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def filter(self, record: logging.LogRecord) -> bool:
        subjects: dict[str, str] = {"service": self._service}
        if (call := current_call()) is not None:
            subjects["trace_id"] = call.context.trace_id.hex()
            if call.generation_id:
                subjects["generation_id"] = call.generation_id
        for name, value in {**subjects, **_bound.get({})}.items():
            record.__dict__.setdefault(name, value)
        return True


class _TextFormatter(logging.Formatter):
    """A line for people: time of day, level, process, message, and what it is about at the end."""

    def __init__(self) -> None:
        super().__init__(
            "%(asctime)s.%(msecs)03d %(levelname).1s %(service)s[%(process)d] %(name)s: %(message)s", "%H:%M:%S"
        )

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name of logging
        subjects = {name: record.__dict__[name] for name in _SUBJECTS if name in record.__dict__}
        if "generation_id" in subjects:
            subjects.pop("session_id", None)  # its first half
        end = " ".join(f"{name.removesuffix('_id')}={value}" for name, value in subjects.items())
        line = super().formatMessage(record) + (f" [{end}]" if end else "")
        return line.translate(_CONTROLS)


class _JsonFormatter(JsonFormatter):
    """A line for programs: one JSON object."""

    def __init__(self) -> None:
        super().__init__(list(_FIELDS), rename_fields={**_FIELDS, "exc_info": "exception", "stack_info": "stack"})

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - as above
        """RFC 3339 in UTC."""
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def configure_logging(service: str, *, file: Path | None = None, json: bool = False) -> None:
    """Sends the log to a file or to standard error, one line per event.

    Args:
        service: its name stands in every line.
        file: appended to; what else was configured before is replaced then. None is standard error.
        json: JSON instead of text: `timestamp` (RFC 3339, UTC), `level`, `service`, `pid`, `logger`, `message`, and
            where they are known `trace_id`, `generation_id`, `session_id`, `exception`.

    Raises:
        OSError: the file cannot be opened.
    """
    handler = (
        logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
        if file
        else logging.StreamHandler(sys.stderr)
    )
    handler.addFilter(_Subjects(service))
    handler.setFormatter(_JsonFormatter() if json else _TextFormatter())
    logging.basicConfig(handlers=[handler], force=file is not None, level=logging.INFO)
