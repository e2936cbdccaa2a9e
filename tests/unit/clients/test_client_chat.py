"""The conversation on a real (pseudo) terminal: prompts, Ctrl-C, Ctrl-D, colours, control characters."""

from __future__ import annotations

import asyncio
import os
import pty
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.unit.clients.fake_server import GENERATION_ID, FakeServer, Feed, Log, after, silence

TEXT = "the quick brown fox jumps"
CTRL_C, CTRL_D = b"\x03", b"\x04"
# The first terminal that a new session opens becomes its own, so that Ctrl-C reaches it.
TAKE_TERMINAL = "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execv(sys.argv[1], sys.argv[1:])"
TALK = """
import sys
import time
from fermata.cli import run_chat
end = run_chat(sys.argv[1])
print(f"ended as {end.name}", flush=True)
"""


class Terminal:
    """A process on a terminal of its own: keys go in, the screen comes out."""

    def __init__(self) -> None:
        self.screen = ""
        self._leader, self._follower = pty.openpty()

    async def start(self, *command: str) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            TAKE_TERMINAL,
            *command,
            stdin=self._follower,
            stdout=self._follower,
            stderr=self._follower,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(self._follower)
        asyncio.get_running_loop().add_reader(self._leader, self._read)

    def press(self, keys: bytes) -> None:
        os.write(self._leader, keys)

    async def shows(self, text: str, times: int = 1) -> None:
        """Waits until the screen has shown a text this often."""
        deadline = time.monotonic() + 15
        while self.screen.count(text) < times:
            assert time.monotonic() < deadline, f"{text!r} does not come; the screen shows {self.screen!r}"
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        asyncio.get_running_loop().remove_reader(self._leader)
        os.close(self._leader)

    def _read(self) -> None:
        try:
            self.screen += os.read(self._leader, 65536).decode()
        except OSError:  # the process has ended
            asyncio.get_running_loop().remove_reader(self._leader)


@pytest.fixture
async def terminal() -> AsyncIterator[Terminal]:
    terminal = Terminal()
    yield terminal
    await terminal.close()


async def test_conversation_with_ctrl_c_and_ctrl_d(terminal: Terminal) -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        server.script.append(after(2, silence))
        await terminal.start(sys.executable, "-c", TALK, server.address)
        await terminal.shows("> ")
        terminal.press(b"hello\n")
        await terminal.shows("the quick ")
        terminal.press(CTRL_C)
        await terminal.shows("cancelled")
        assert len(server.requests("Cancel")) == 1
        await terminal.shows("> ", 2)
        terminal.press(b"again\n")
        await terminal.shows("jumps")
        assert f"\x1b[2mgeneration {GENERATION_ID}\x1b[0m" in terminal.screen, "a terminal has colours"
        second = server.requests("StreamGenerate")[1].generation
        assert second.session_id != "", "the cancelled turn is part of the session"
        await terminal.shows("> ", 3)
        terminal.press(CTRL_D)
        await terminal.shows("ended as END_OF_INPUT")


async def test_ctrl_c_at_the_prompt_is_told_apart(terminal: Terminal) -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        await terminal.start(sys.executable, "-c", TALK, server.address)
        await terminal.shows("> ")
        terminal.press(CTRL_C)
        await terminal.shows("ended as INTERRUPTED")
        assert server.calls == []


async def test_a_reply_cannot_steer_the_terminal(terminal: Terminal) -> None:
    async def act(feed: Feed) -> Any:
        tokens = feed.tokens(1)
        tokens[0].tokens.text = "\x1b]0;owned\x07 done\n"
        for event in [feed.started(), *tokens, *feed.tokens(), *feed.finished()]:
            yield event

    async with FakeServer(Log.of(TEXT)) as server:
        server.script.append(act)
        await terminal.start(sys.executable, "-m", "fermata.cli", "generate", "x", "--server", server.address)
        await terminal.shows("jumps")
    assert "\\x1b]0;owned\\x07 done" in terminal.screen
    assert "\x1b]" not in terminal.screen


async def test_a_person_goes_on_after_a_failure(terminal: Terminal) -> None:
    from services.common.errors import Overloaded
    from tests.unit.clients.fake_server import refused

    async with FakeServer(Log.of(TEXT)) as server:
        server.script.append(refused(Overloaded("full", retry_delay=1.0)))
        await terminal.start(sys.executable, "-m", "fermata.cli", "chat", "--server", server.address)
        await terminal.shows("> ")
        terminal.press(b"hello\n")
        await terminal.shows("full (OVERLOADED); try again later")
        terminal.press(b"again\n")
        await terminal.shows("jumps")
        terminal.press(CTRL_D)
        assert await terminal.process.wait() == 0
