"""`fermata-server`: starts, ends and shows a system on this machine.

    fermata-server up        start it and stay until Ctrl-C; --detach returns when it is ready
    fermata-server down      end what `up` started in a state directory
    fermata-server status    list what runs; --json for programs
    fermata-server restart   replace the processes of a service while the system serves

Progress goes to standard error; standard output gets the one line `ready grpc://HOST:PORT` when the first request would
be served. Knows the terminal and signals; what runs and how is `services.local`'s.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fermata import Options
from fermata import cli as client
from services.config import REPLICATED_SERVICES, SystemConfig, load, process_environment, to_arguments
from services.local.errors import LocalError
from services.local.keeper import log_tail
from services.local.restart import restart as replace_all
from services.local.serving import is_served
from services.local.state import StateDirectory
from services.local.status import status as describe
from services.local.status import table
from services.local.system import System, take_down

PROGRAM = [sys.executable, "-P", "-m", "services.cli"]
FIRST_MESSAGE = "Tell me a story."
FIRST_OPTIONS: Options = {"max_tokens": 256}
_OTHER_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Progress:
    """Where lines of progress go: standard error, and a file instead once the terminal belongs to a chat."""

    def __init__(self) -> None:
        self._file: Path | None = None

    def move_to(self, file: Path | None) -> None:
        """Appends further lines to `file`; None takes standard error again."""
        self._file = file

    def __call__(self, text: str) -> None:
        """Writes one line; a terminal that has gone away does not matter."""
        with contextlib.suppress(OSError):
            if self._file is None:
                print(text, file=sys.stderr, flush=True)
            else:
                with self._file.open("a") as file:
                    print(text, file=file)


def up(arguments: Sequence[str]) -> int:
    """Runs a system until a signal."""
    parser = _parser("up", "starts a system on this machine and keeps it running until Ctrl-C")
    parser.add_argument("--detach", action="store_true", help="return when the system is ready")
    parser.add_argument("--chat", action="store_true", help="chat with the model when ready")
    config, options = load(SystemConfig, arguments, parser=parser)
    if options.detach and options.chat:
        parser.error("--detach leaves no terminal to chat in")
    if options.detach:
        return _detach(config)
    progress = Progress()
    system = System(config, environment=process_environment(), report=progress, is_served=is_served)
    with _on_signals(system.interrupt), system:
        system.start()
        print(f"ready grpc://{system.address}", flush=True)
        if options.chat and not _converse(system, progress):
            return 0
        system.wait()
    return 0


def down(arguments: Sequence[str]) -> int:
    """Ends the system of a state directory."""
    config, _ = load(SystemConfig, arguments, parser=_parser("down", "ends what `up` started in a state directory"))
    state = StateDirectory(config.state_dir)
    progress = Progress()
    progress("stopped" if take_down(state, progress) else f"nothing runs in {state.path}")
    return 0


def status(arguments: Sequence[str]) -> int:
    """Shows the system of a state directory; status 1 when nothing runs there."""
    parser = _parser("status", "lists what runs in a state directory")
    parser.add_argument("--json", action="store_true", help="print JSON")
    config, options = load(SystemConfig, arguments, parser=parser)
    description = describe(StateDirectory(config.state_dir))
    print(json.dumps(description, indent=2) if options.json else table(description))
    return 0 if description["deployments"] else 1


def restart(arguments: Sequence[str]) -> int:
    """Replaces the processes of one service, one after the other."""
    parser = _parser("restart", "replaces the processes of a service by fresh ones while the system serves")
    parser.add_argument("service", choices=REPLICATED_SERVICES)
    config, options = load(SystemConfig, arguments, parser=parser)
    count = replace_all(StateDirectory(config.state_dir), options.service)
    Progress()(f"{options.service}: {count} replaced")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"up": up, "down": down, "status": status, "restart": restart}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="fermata-server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = parser.parse_args(given[:1]).command
    try:
        return COMMANDS[command](given[1:])
    except LocalError as error:
        print(f"fermata-server: {error}", file=sys.stderr)
        return 1


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"fermata-server {command}", description=description, allow_abbrev=False)


def _detach(config: SystemConfig) -> int:
    """Starts `up` in the background; returns when it is ready or has failed."""
    state = StateDirectory(config.state_dir)
    state.create()
    log_end = state.log.stat().st_size if state.log.exists() else 0
    with state.log.open("ab") as log:
        process = subprocess.Popen(
            [*PROGRAM, "up", *to_arguments(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    assert process.stdout is not None
    with _on_signals(process.terminate), process.stdout:
        ready = process.stdout.readline()
    if not ready:
        status = process.wait()
        print(log_tail(state.log, log_end), file=sys.stderr)
        return status or 1
    print(ready.decode(), end="", flush=True)
    return 0


def _converse(system: System, progress: Progress) -> bool:
    """Chats in a terminal, answers one fixed message without; returns whether the system shall stay up then."""
    try:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            with _on_signals(_raise_ended):
                client.run_chat(system.address, source=io.StringIO(FIRST_MESSAGE), options=FIRST_OPTIONS)
            return True
        progress.move_to(system.log)
        with _on_signals(_raise_ended, *_OTHER_SIGNALS), _on_signals(_raise_interrupt, signal.SIGINT):
            if client.run_chat(system.address) is client.ChatEnd.INTERRUPTED:
                return False
    except (KeyboardInterrupt, _Ended):
        return False
    progress.move_to(None)
    progress("the system stays up until Ctrl-C")
    return True


class _Ended(BaseException):
    """A signal that ends the system came during the chat, where Ctrl-C would only cancel a reply."""


def _raise_ended() -> NoReturn:
    raise _Ended


def _raise_interrupt() -> NoReturn:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _on_signals(handler: Callable[[], object], *numbers: signal.Signals) -> Iterator[None]:
    """Calls `handler` at the given signals while the context lasts; without any, at all that end a program."""

    def handle(number: int, frame: FrameType | None) -> None:
        handler()

    before = {number: signal.getsignal(number) for number in numbers or (signal.SIGINT, *_OTHER_SIGNALS)}
    for number, previous in before.items():
        if number is not signal.SIGHUP or previous is not signal.SIG_IGN:  # nohup
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


if __name__ == "__main__":
    sys.exit(main())
