"""The terminal client as people and scripts run it: a process of its own against a real server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any, NamedTuple

import grpc
import pytest

from fermata import cli
from fermata.v1 import common_pb2
from services.common import errors as server_errors
from tests.unit.clients.fake_server import (
    GENERATION_ID,
    SESSION_ID,
    FakeServer,
    Feed,
    Log,
    Status,
    after,
    refused,
    silence,
)
from tests.unit.clients.proxy import Proxy

TEXT = "the quick brown fox jumps"
COMMAND = [sys.executable, "-m", "fermata.cli"]


class Result(NamedTuple):
    status: int
    output: str
    errors: str

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.output.splitlines()]


async def start(*arguments: str, server: str = "", **environment: str) -> asyncio.subprocess.Process:
    variables = {**os.environ, "FERMATA_SERVER": server or "127.0.0.1:1", **environment}
    return await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=variables,
    )


async def finish(process: asyncio.subprocess.Process, given: str = "") -> Result:
    try:
        async with asyncio.timeout(20):
            output, errors = await process.communicate(given.encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Result(process.returncode, output.decode(), errors.decode())


async def run(*arguments: str, server: str = "", given: str = "", **environment: str) -> Result:
    return await finish(await start(*arguments, server=server, **environment), given)


async def test_generate_prints_text_and_the_generation() -> None:
    async with FakeServer(Log.of(TEXT, rest="!")) as server:
        result = await run("generate", "a prompt", "--max-tokens", "5", "--server", f"grpc://{server.address}")
    assert result == Result(0, TEXT + " !\n", f"generation {GENERATION_ID}\n")
    request = server.requests("StreamGenerate")[0].generation
    assert request.prompt == "a prompt"
    assert request.stop.max_tokens == 5
    assert not request.sampling.HasField("temperature")


async def test_generate_takes_all_flags() -> None:
    flags = [
        *("--top-k", "4", "--top-p", "0.5", "--min-p", "0.25", "--seed", "9", "--n", "2", "--max-tokens", "7"),
        *("--stop", "one", "--stop", "two", "--session", SESSION_ID, "--greedy", "--detach"),
        *("--chat", "--system", "be brief"),
    ]
    async with FakeServer(Log.of("one two", "three")) as server:
        result = await run("generate", "hello", *flags, server=server.address)
    assert result.status == 0
    assert result.output == "── choice 0: max_tokens ──\none two \n── choice 1: max_tokens ──\nthree \n"
    request = server.requests("StreamGenerate")[0].generation
    sampling, stop = request.sampling, request.stop
    assert (sampling.temperature, sampling.HasField("temperature"), sampling.top_k) == (0.0, True, 4)
    assert (sampling.top_p, sampling.min_p, sampling.seed) == (0.5, 0.25, 9)
    assert (request.n, request.detach, request.session_id) == (2, True, SESSION_ID)
    assert (stop.max_tokens, list(stop.strings)) == (7, ["one", "two"])
    assert [message.content[0].text for message in request.chat.messages] == ["be brief", "hello"]


async def test_json_is_one_event_a_line_with_defaults() -> None:
    log = Log.of(TEXT)
    async with FakeServer(log) as server, Proxy(server) as proxy:
        server.script.append(after(2, proxy.cut))
        result = await run("--json", "generate", "-", server=proxy.address, given="from a pipe")
    assert result.status == 0
    assert server.requests("StreamGenerate")[0].generation.prompt == "from a pipe"
    events = result.lines
    assert [next(iter(event)) for event in events] == ["started", *["tokens"] * 5, "finished"]
    assert events[0]["started"]["generation_id"] == GENERATION_ID
    assert events[1]["tokens"]["first_offset"] == 0
    assert events[1]["tokens"]["choice"] == 0
    assert [token for event in events[1:-1] for token in event["tokens"]["token_ids"]] == log.token_ids()
    assert events[-1]["finished"]["finish_reason"] == "FINISH_REASON_MAX_TOKENS"
    assert events[-1]["finished"]["usage"] == {"prompt_tokens": 3, "output_tokens": 5, "cached_tokens": 1}
    assert result.errors.startswith(f"generation {GENERATION_ID}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("unknown",),
        ("generate", "x", "--top-k", "many"),
        ("generate", "x", "--n", "-1"),
        ("generate", "x", "--seed", str(2**64)),
        ("generate", "x", "--greedy", "--temperature", "1"),
        ("generate", "x", "--system", "without chat"),
        ("generate", "x", "--server", "no-port"),
        ("resume",),
        ("resume", GENERATION_ID, "--count", "-1"),
    ],
    ids=" ".join,
)
async def test_usage_errors(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: int | str | None = cli.main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert capsys.readouterr().err


async def test_failures_are_one_line_with_status_1() -> None:
    violation = server_errors.FieldViolation("generation.n", "must be within 1 to 8")
    async with FakeServer(Log.of(TEXT)) as server:
        server.script.append(refused(server_errors.InvalidRequest("bad request", violations=[violation])))
        invalid = await run("generate", "x", server=server.address)
        server.script.append(after(2, server_errors.InternalError("a bug")))
        broken = await run("generate", "x", server=server.address)
        server.failures.append(server_errors.SessionNotFound("no such session"))
        missing = await run("sessions", "show", "nope", server=server.address)
    assert (invalid.status, invalid.output) == (1, "")
    assert invalid.errors == "fermata: bad request; generation.n: must be within 1 to 8 (INVALID_FIELD)\n"
    assert broken.status == 1
    assert broken.output == "the quick \n"
    assert f"fermata: a bug; go on with `fermata resume {GENERATION_ID} --count 2` (INTERNAL)\n" in broken.errors
    assert missing.status == 1
    assert "(SESSION_NOT_FOUND)" in missing.errors
    for result in (invalid, missing):
        assert "Traceback" not in result.errors
        assert len(result.errors.splitlines()) == 1


def test_no_server_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "FIRST_CONTACT", 0.2)
    assert cli.main(["generate", "x", "--server", "127.0.0.1:1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fermata: no server answers at 127.0.0.1:1; start one with `fermata-server up`")


async def test_text_that_is_not_utf8() -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        process = await start("generate", server=server.address, PYTHONUTF8="1")
        output, errors = await process.communicate(b"\xff\xfe")
    assert (process.returncode, output, errors) == (2, b"", b"fermata: the text is not UTF-8\n")


async def test_choice_that_failed_is_status_1() -> None:
    async def act(feed: Feed) -> Any:
        events = [feed.started(), *feed.tokens(), *feed.finished()]
        events[-1].finished.finish_reason = common_pb2.FINISH_REASON_ERROR
        events[-1].finished.error.message = "not a number"
        for event in events:
            yield event

    async with FakeServer(Log.of(TEXT)) as server:
        server.script.append(act)
        result = await run("generate", "x", server=server.address)
    assert result.status == 1
    assert "choice 0 failed: not a number" in result.errors


async def interrupted(server: FakeServer, *arguments: str) -> Result:
    """Runs a command, sends Ctrl-C when its first tokens have come, returns how it ended."""
    server.script.append(after(2, silence))
    process = await start(*arguments, server=server.address)
    assert process.stdout is not None
    async with asyncio.timeout(20):
        shown = (await process.stdout.readexactly(len("the quick "))).decode()
    process.send_signal(signal.SIGINT)
    result = await finish(process)
    return result._replace(output=shown + result.output)


async def test_interrupt_cancels_the_generation() -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        result = await interrupted(server, "generate", "x")
        assert len(server.requests("Cancel")) == 1
    assert (result.status, result.output) == (1, "the quick \n")
    assert result.errors == f"generation {GENERATION_ID}\nfermata: cancelled\n"


async def test_interrupt_leaves_what_is_detached_or_resumed() -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        for arguments in (("generate", "x", "--detach"), ("resume", GENERATION_ID)):
            result = await interrupted(server, *arguments)
            assert result.status == 1
            assert f"go on with `fermata resume {GENERATION_ID} --count 2`" in result.errors
        assert server.requests("Cancel") == []


async def test_resume_goes_on_behind_the_count() -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        result = await run("resume", GENERATION_ID, "--count", "3", server=server.address)
        from_start = await run("resume", GENERATION_ID, server=server.address)
    assert result == Result(0, "fox jumps \n", f"generation {GENERATION_ID}\n")
    assert from_start.output == TEXT + " \n"
    first, second = server.requests("Resume")
    assert [cursor.count for cursor in first.cursors] == [3]
    assert not second.cursors


async def test_reader_that_leaves_early() -> None:
    """`fermata generate … | head -c 3`: the generation is cancelled and nothing is complained about."""
    async with FakeServer(Log.of(" ".join(["word"] * 400))) as server:

        async def act(feed: Feed) -> Any:
            yield feed.started()
            for event in feed.tokens():
                yield event
                await asyncio.sleep(0.001)
            for event in feed.finished():
                yield event

        server.script.append(act)
        process = await asyncio.create_subprocess_shell(
            f"{' '.join(COMMAND)} generate x --server {server.address} | head -c 3",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        result = await finish(process)
        assert len(server.requests("Cancel")) == 1
    assert result.output == "wor"
    assert result.errors == f"generation {GENERATION_ID}\n"


async def test_tokens() -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        table = await run("tokens", "I like €", server=server.address)
        lines = await run("tokens", "I like €", "--json", "--special", server=server.address)
    assert table.status == 0
    assert table.output.splitlines() == [
        "PIECE        ID   SPECIAL",
        '"I l"        100',
        '"ike"        101',
        '" \\xe2\\x82"  102',
        '"\\xac"       103',
        '"<end>"      2    special',
    ]
    (response,) = lines.lines
    assert response["tokens"][0] == {"token_id": 100, "piece": "SSBs", "special": False}
    assert server.requests("Tokenize")[1].parse_special


async def test_sessions() -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        table = await run("sessions", "list", server=server.address, TZ="UTC")
        listed = await run("sessions", "list", "--json", "--limit", "3", server=server.address)
        shown = await run("sessions", "show", "session0", server=server.address, TZ="UTC")
        described = await run("sessions", "show", "session0", "--json", server=server.address)
    assert table.output.splitlines()[0].split() == ["SESSION", "STATE", "GENERATIONS", "OPENED", "EXPIRES"]
    assert table.output.splitlines()[1].split() == ["session0", "idle", "1", "2023-11-14", "22:13:20", "-"]
    assert len(table.output.splitlines()) == 7
    assert [line["session_id"] for line in listed.lines] == ["session0", "session1", "session2"]
    assert listed.lines[0]["state"] == "SESSION_STATE_IDLE"
    assert "session session0: idle" in shown.output
    assert "label team = blue" in shown.output
    assert GENERATION_ID in shown.output
    assert described.lines[0]["generations"][0]["output_tokens"] == [5]


async def test_timings_are_asked_for_and_what_is_measured_here_is_told() -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        result = await run("generate", "x", "--timings", server=server.address)
    assert (result.status, result.output) == (0, TEXT + " \n")
    (request,) = server.requests("StreamGenerate")
    assert request.generation.output.timings
    assert "first token after" in result.errors
    assert "5 tokens in" in result.errors


async def test_chat_from_a_pipe_keeps_the_session() -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        result = await run(
            "chat", "--system", "be brief", "--greedy", server=server.address, given="hello\n\nand then?\n"
        )
    assert (result.status, result.output) == (0, f"{TEXT} \n{TEXT} \n")
    first, second = (request.generation for request in server.requests("StreamGenerate"))
    assert [message.content[0].text for message in first.chat.messages] == ["be brief", "hello"]
    assert first.session_id == ""
    assert [message.content[0].text for message in second.chat.messages] == ["and then?"]
    assert second.session_id == SESSION_ID


async def test_chat_from_a_pipe_ends_at_a_failure() -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        server.script.append(refused(server_errors.NoChatTemplate("the model has no template")))
        result = await run("chat", server=server.address, given="hello\nagain\n")
    assert result.status == 1
    assert "(NO_CHAT_TEMPLATE)" in result.errors
    assert len(server.requests("StreamGenerate")) == 1


async def test_bare_status_is_named() -> None:
    async with FakeServer(Log.of(TEXT)) as server:
        server.script.append(refused(Status(grpc.StatusCode.PERMISSION_DENIED, "not for you")))
        result = await run("generate", "x", server=server.address)
    assert (result.status, result.errors) == (1, "fermata: not for you (PERMISSION_DENIED)\n")
