"""`fermata trace`: asks the server or reads a file; writes text, a page or the document."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fermata import AsyncClient, Client, cli
from fermata.errors import GenerationNotFound
from fermata.v1 import telemetry_pb2
from fermata.v1.telemetry_pb2_grpc import TelemetryServiceServicer, add_TelemetryServiceServicer_to_server
from services.common import errors as server_errors
from services.common import rpc
from tests.unit.clients.trace_document import GENERATION, Plan, merged, trace_document

DOCUMENT = trace_document()


class Telling(TelemetryServiceServicer):
    """Remembers one generation."""

    def __init__(self) -> None:
        self.asked: list[telemetry_pb2.GetTraceRequest] = []
        self.document = DOCUMENT

    async def GetTrace(self, request: telemetry_pb2.GetTraceRequest, context: Any) -> telemetry_pb2.GetTraceResponse:
        self.asked.append(request)
        if request.generation.generation_id == "unknown":
            raise server_errors.GenerationNotFound("nobody remembers it")
        return telemetry_pb2.GetTraceResponse(otlp_json=self.document)

    async def GetStatistics(self, request: Any, context: Any) -> telemetry_pb2.GetStatisticsResponse:
        raise NotImplementedError


@pytest.fixture
async def served() -> AsyncIterator[tuple[Telling, str]]:
    """A server and its HOST:PORT."""
    telling = Telling()
    server = rpc.public_server(reuse_port=False)
    add_TelemetryServiceServicer_to_server(telling, server)
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    yield telling, f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "document.json"
    path.write_bytes(DOCUMENT)
    return path


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the command runs."""
    monkeypatch.chdir(tmp_path)


def run(*arguments: str | Path) -> int:
    """Exit status of a command."""
    try:
        return cli.main([str(argument) for argument in ("trace", *arguments)])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


async def test_clients_ask_for_the_document(served: tuple[Telling, str]) -> None:
    telling, address = served
    async with AsyncClient(address) as client:
        assert await client.trace(GENERATION) == DOCUMENT
        with pytest.raises(GenerationNotFound):
            await client.trace("unknown")

    def ask() -> bytes:
        with Client(address) as sync_client:
            return sync_client.trace(request_id="mine", session_id="talk", timeout=5)

    assert await asyncio.to_thread(ask) == DOCUMENT
    names = [request.generation for request in telling.asked]
    assert names[0].generation_id == GENERATION
    assert (names[2].request_id, names[2].session_id) == ("mine", "talk")
    assert not any(request.here_only for request in telling.asked)


async def test_a_generation_of_the_server(served: tuple[Telling, str], capsys: pytest.CaptureFixture[str]) -> None:
    telling, address = served
    assert await asyncio.to_thread(run, GENERATION, "--server", address) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"generation {GENERATION}\n")
    assert "also computed 512 prompt tokens" in " ".join(output.split())
    assert await asyncio.to_thread(run, GENERATION, "--json", "--server", address) == 0
    assert capsys.readouterr().out.encode() == DOCUMENT + b"\n"
    assert [request.generation.generation_id for request in telling.asked] == [GENERATION] * 2


async def test_what_the_server_does_not_know(served: tuple[Telling, str], capsys: pytest.CaptureFixture[str]) -> None:
    telling, address = served
    assert await asyncio.to_thread(run, "unknown", "--server", address) == 1
    assert "nobody remembers it (GENERATION_NOT_FOUND)" in capsys.readouterr().err
    telling.document = b'{"resourceSpans": []}'
    assert await asyncio.to_thread(run, "another", "--server", address) == 1
    assert capsys.readouterr().err == "fermata: the document has no generation another\n"


def test_a_file_needs_no_server(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--file", file, "--server", "127.0.0.1:1") == 0
    assert capsys.readouterr().out.startswith(f"generation {GENERATION}\n")


def test_one_of_several_in_a_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_bytes(merged(DOCUMENT, trace_document(Plan(generation_id="other", tokens=3, seed=8))))
    assert run("other", "--file", file) == 0
    assert capsys.readouterr().out.startswith("generation other\n")
    assert run("--file", file) == 2
    assert "the document has 2 generations, name one: " in capsys.readouterr().err


def test_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(DOCUMENT)))
    assert run("--file", "-") == 0
    assert capsys.readouterr().out.startswith(f"generation {GENERATION}\n")


def test_width_of_the_terminal(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    longest = []
    for columns in ("70", "150"):
        monkeypatch.setenv("COLUMNS", columns)
        assert run("--file", file) == 0
        longest.append(max(map(len, capsys.readouterr().out.splitlines())))
    assert longest == [70, 150]


def test_a_page(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert run("--file", file, "--html", page) == 0
    written = capsys.readouterr()
    assert (written.out, written.err) == ("", f"wrote {page}\n")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert run("--file", file, "--html", tmp_path / "nowhere" / "page.html") == 1
    assert "No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "arguments", "complaint"),
    [
        (None, (), "the id of a generation is needed, or a document with --file"),
        (None, ("--file", "nothing.json"), "nothing.json: No such file or directory"),
        (b"no document", ("--file", "here.json"), "this is not a document of spans in OTLP/JSON"),
        (DOCUMENT, ("another", "--file", "here.json"), "the document has no generation another"),
    ],
)
def test_usage_errors(
    content: bytes | None,
    arguments: tuple[str, ...],
    complaint: str,
    empty_folder: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        Path("here.json").write_bytes(content)
    assert run(*arguments) == 2
    assert complaint in capsys.readouterr().err
