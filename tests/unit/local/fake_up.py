"""`fermata-server` with services that do nothing and a chat that answers nothing; the session store is real."""

from __future__ import annotations

import functools
import sys
import time
from types import SimpleNamespace
from typing import TextIO

from fermata.chat import ChatEnd
from fermata.requests import Options
from services import cli
from services.local.system import System
from tests.unit.local.fake_service import MODULES, accepts


def run_chat(server: str, *, source: TextIO | None = None, options: Options | None = None) -> ChatEnd:
    """Behaves as the client's chat does: Ctrl-C cancels a reply and ends a chat at its prompt; Ctrl-D ends it."""
    if source is not None:
        print(f"{server} is asked: {source.read()} {options}", flush=True)
        return ChatEnd.END_OF_INPUT
    while True:
        print("you: ", end="", flush=True)
        try:
            if not sys.stdin.readline():
                return ChatEnd.END_OF_INPUT
        except KeyboardInterrupt:
            return ChatEnd.INTERRUPTED
        try:
            print("a reply begins", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("the reply is cancelled", flush=True)


if __name__ == "__main__":
    setattr(cli, "System", functools.partial(System, modules=MODULES))  # noqa: B010
    setattr(cli, "is_served", accepts)  # noqa: B010
    setattr(cli, "PROGRAM", [sys.executable, __file__])  # noqa: B010
    setattr(cli, "client", SimpleNamespace(ChatEnd=ChatEnd, run_chat=run_chat))  # noqa: B010
    sys.exit(cli.main())
