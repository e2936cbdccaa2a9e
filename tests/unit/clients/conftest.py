"""Fixtures of the client's tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from fermata import aio_stream, sync_stream
from tests.unit.clients.collecting import Read, Reading, read_async, read_sync


@pytest.fixture(params=["async", "sync"])
def read(request: pytest.FixtureRequest) -> Read:
    """Reads a stream to its end with one of the two clients."""
    if request.param == "async":
        return read_async

    def in_thread(*arguments: Any, **options: Any) -> Awaitable[Reading]:
        return asyncio.to_thread(read_sync, *arguments, **options)

    return in_thread


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links are dead after 0.4 s of silence instead of 3."""
    monkeypatch.setattr(aio_stream, "SILENCE", 0.4)
    monkeypatch.setattr(sync_stream, "SILENCE", 0.4)
