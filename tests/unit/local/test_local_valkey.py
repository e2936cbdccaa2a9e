"""The embedded session store, with the real server."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from services.local import valkey
from services.local.errors import NoSessionStore

Start = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[Path]:
    path = valkey.choose_socket(tmp_path)
    yield path
    valkey.remove_socket(path, tmp_path)


@pytest.fixture
def start(tmp_path: Path, socket_path: Path) -> Iterator[Start]:
    store = tmp_path / "a store"
    store.mkdir()
    children: list[subprocess.Popen[bytes]] = []

    def started() -> subprocess.Popen[bytes]:
        command = valkey.command(valkey.find_server(), socket_path, store)
        children.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        deadline = time.monotonic() + 10
        while not valkey.answers(socket_path):
            assert children[-1].poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return children[-1]

    yield started
    for child in children:
        child.kill()
        child.wait()


@contextlib.contextmanager
def client(path: Path) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.url(path)) as link:
        yield link


def test_acknowledged_writes_outlive_a_kill(start: Start, socket_path: Path) -> None:
    server = start()
    with client(socket_path) as link:
        for index in range(100):
            link.set(f"key {index}", index)
    server.kill()
    server.wait()
    assert not valkey.answers(socket_path)
    start()
    with client(socket_path) as link:
        assert link.mget([f"key {index}" for index in range(100)]) == [b"%d" % index for index in range(100)]


def test_keeps_everything_and_listens_on_the_socket_alone(start: Start, socket_path: Path) -> None:
    server = start()
    with client(socket_path) as link:
        settings = link.config_get("maxmemory-policy", "appendonly", "appendfsync", "save", "port", "maxmemory")
    assert settings["maxmemory-policy"] == "noeviction"
    assert (settings["appendonly"], settings["appendfsync"], settings["save"]) == ("yes", "everysec", "")
    assert settings["port"] == "0"
    assert int(settings["maxmemory"] or 0) > 1 << 28
    assert socket_path.stat().st_mode & 0o077 == 0
    server.terminate()
    assert server.wait() == 0
    assert not socket_path.exists()


def test_a_long_path_gets_a_short_socket(tmp_path: Path) -> None:
    short = valkey.choose_socket(tmp_path)
    assert short.parent == tmp_path
    deep = tmp_path / ("d" * 120)
    path = valkey.choose_socket(deep)
    assert path.parent.is_dir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    valkey.remove_socket(path, deep)
    assert not path.parent.exists()
    valkey.remove_socket(path, deep)  # twice does no harm


def test_the_longest_path_that_fits_stays(tmp_path: Path) -> None:
    room = 107 - len(os.fsencode(tmp_path)) - len("//valkey.sock")
    fits = tmp_path / ("d" * room)
    fits.mkdir()
    path = valkey.choose_socket(fits)
    assert path.parent == fits
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def test_without_the_wheel_a_server_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.local.valkey.importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoSessionStore, match="--redis-url"):
        valkey.find_server()
    server = tmp_path / "redis-server"
    server.touch(mode=0o755)
    assert valkey.find_server() == server


def test_no_answer_is_no_error(tmp_path: Path) -> None:
    assert not valkey.answers(tmp_path / "nobody")
    path = valkey.choose_socket(tmp_path)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    assert not valkey.answers(path)
