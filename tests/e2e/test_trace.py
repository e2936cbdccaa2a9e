"""Where the time of a token went, on a whole system: nothing is hidden, planted delays are named, spans collected."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fermata import Tokens
from fermata.aio import AsyncClient
from fermata.blame import outliers
from fermata.stream import StreamState
from fermata.trace import read_trace
from tests.e2e.system import UpSystem, client, wait_for
from tests.unit.common.otlp_receiver import Receiver, receiving

pytestmark = pytest.mark.timeout(240)

STREAMS, TOKENS = 32, 60
DELAY = 0.4


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as started:
        yield started


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[UpSystem]:
    environment = {
        "FERMATA_OTLP_ENDPOINT": receiver.endpoint,
        "FERMATA_SLOW_TOKEN": "0.2",
        "FERMATA_STEP_TIME": "0",  # else a long prompt beside a stream would hardly be felt
        # Long after all else that this file does with the tokenizer.
        "FERMATA_FAILPOINTS": "tokenizer.detokenize:sleep=0.4@6000",
    }
    folder = tmp_path_factory.mktemp("trace") / "state"
    with UpSystem(folder, "--testing", environment=environment) as started:
        yield started


async def test_every_token_of_32_streams_is_accounted_for(system: UpSystem) -> None:
    """Against arrivals that are taken down here: all processes of this machine share a clock."""
    accounted: list[float] = []
    missing: list[float] = []
    options: dict[str, Any] = {"ignore_eos": True, "max_tokens": TOKENS, "timings": True}

    async def read(client: AsyncClient, number: int) -> None:
        async with client.stream(token_ids=[20 + number, 30, 40], **options) as stream:
            last = count = 0
            async for event in stream:
                if isinstance(event, Tokens):
                    now = time.monotonic_ns()
                    assert len(event.timings) == len(event.token_ids)
                    for place, timings in enumerate(event.timings):
                        if count and not place:
                            unknown = abs(now - last - timings.total_ns) + abs(timings.unaccounted_ns)
                            missing.append(unknown / 1e6)
                            accounted.append(1 - unknown / (now - last))
                        count += 1
                    last = now
            assert count == TOKENS

    async with AsyncClient(system.address) as reader:
        await asyncio.gather(*(read(reader, number) for number in range(STREAMS)))
    assert len(accounted) > STREAMS * TOKENS / 2
    assert statistics.median(accounted) >= 0.98
    assert statistics.quantiles(missing, n=100)[98] <= 1.0


@asynccontextmanager
async def generating(system: UpSystem, **options: Any) -> AsyncIterator[StreamState]:
    """A stream that has had 40 tokens and goes on to 200."""
    async with AsyncClient(system.address) as reader:
        asked: dict[str, Any] = {"token_ids": [20, 30, 40], "ignore_eos": True, "max_tokens": 200} | options
        async with reader.stream(**asked) as stream:
            async for _ in stream:
                if len(stream.token_ids) >= 40:
                    break
            yield stream
            async for _ in stream:
                pass


def verdict(system: UpSystem, generation_id: str) -> tuple[str, float, str]:
    """The part that the slowest token's time was in, its share of the planted delay, and what `fermata trace` says."""
    document = client("trace", generation_id, "--json", server=system.address).stdout
    trace = read_trace(document)
    assert len(trace.choices[0]) == 200
    slowest = max(outliers(trace), key=lambda found: found.token.interval)
    return slowest.part, slowest.token.parts[slowest.part] / (DELAY * 1e6), shown(system, generation_id)


def shown(system: UpSystem, generation_id: str) -> str:
    """What `fermata trace` says, in one line."""
    return " ".join(client("trace", generation_id, server=system.address).stdout.split())


def pause(pid: int) -> None:
    """Stops a process for a while."""
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(DELAY, os.kill, (pid, signal.SIGCONT)).start()


def pid_of(system: UpSystem, service: str) -> int:
    (replica,) = system.status()["deployments"][service]
    return int(replica["pid"])


OF_SHARD = ("wait", "schedule", "forward", "sample", "publish", "shard_hop")
"""Where the time of a process that stops anywhere can show."""


@pytest.mark.parametrize(
    ("service", "options", "parts"),
    [("shard", {}, OF_SHARD), ("valkey", {"durability": "committed"}, ("commit",))],
)
async def test_a_paused_process_is_named(
    system: UpSystem, service: str, options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    pid = pid_of(system, service)
    async with generating(system, **options) as stream:
        pause(pid)
    assert stream.generation_id is not None
    part, share, said = await asyncio.to_thread(verdict, system, stream.generation_id)
    assert part in parts
    assert share > 0.9
    assert {"shard": "shard", "valkey": "session store was slow"}[service] in said


async def test_a_long_prompt_beside_is_named_with_its_generation(system: UpSystem) -> None:
    async with generating(system) as stream, AsyncClient(system.address) as other:
        # Prompts that nobody had before: nothing of them is cached.
        beside = [[100 + (7 * place + number) % 900 for place in range(900)] for number in range(3)]
        results = await asyncio.gather(*(other.generate(token_ids=prompt, max_tokens=1) for prompt in beside))
    assert stream.generation_id is not None
    document = client("trace", stream.generation_id, "--json", server=system.address).stdout
    slow = [found for found in outliers(read_trace(document)) if found.part == "forward"]
    assert slow, "steps that compute hundreds of prompt tokens are slow"
    sentence = max(slow, key=lambda found: found.token.interval).sentence()
    assert "prompt tokens of" in sentence
    assert any(result.generation_id in sentence for result in results)
    assert max(found.share for found in slow) > 0.9


async def test_a_slow_tokenizer_is_named(system: UpSystem) -> None:
    """Its failpoint sleeps once, after 6000 events."""
    while True:
        async with generating(system) as stream:
            pass
        assert stream.generation_id is not None
        document = client("trace", stream.generation_id, "--json", server=system.address).stdout
        found = [item for item in outliers(read_trace(document)) if item.part == "detokenize"]
        if found:
            break
    assert found[0].token.parts["detokenize"] > 0.9 * DELAY * 1e6
    assert "the tokenizer was slow" in shown(system, stream.generation_id)


async def test_the_collector_has_whole_traces_and_token_spans_of_slow_ones(
    system: UpSystem, receiver: Receiver
) -> None:
    pid = pid_of(system, "shard")
    async with generating(system) as stream:
        pause(pid)
    assert stream.generation_id is not None

    def spans(name: str) -> list[Any]:
        decodes = [span for span in receiver.spans if span.name == "decode"]
        ids = {span.trace_id for span in decodes if attribute(span, "fermata.generation.id") == stream.generation_id}
        return [span for span in receiver.spans if span.trace_id in ids and (not name or span.name == name)]

    def arrived(condition: Callable[[], object], what: str) -> None:
        wait_for(condition, 20, what)

    await asyncio.to_thread(arrived, lambda: spans("sequence") and spans("own") and spans("claim"), "all processes")
    await asyncio.to_thread(arrived, lambda: len(spans("token")) == 200, "a span per token of a slow generation")
    whole = spans("")
    known = {span.span_id for span in whole}
    assert [span.name for span in whole if span.parent_span_id not in known] == [
        "fermata.v1.GenerationService/StreamGenerate"
    ]
    linked = {link.span_id for span in spans("token") for link in span.links}

    def steps() -> set[bytes]:
        return {span.span_id for span in receiver.spans if span.name == "step"}

    await asyncio.to_thread(arrived, lambda: linked <= steps(), "the steps that they link to")
    everything = b"".join(entry.SerializeToString() for entry in receiver.resource_spans)
    assert b"gen_ai.input" not in everything


def attribute(span: Any, name: str) -> str:
    """A text attribute of a span that was received."""
    return next((str(item.value.string_value) for item in span.attributes if item.key == name), "")


def test_prometheus_finds_every_process_and_their_figures(system: UpSystem) -> None:
    import json
    import urllib.request

    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, set[str]] = {}
    for file in Path(system.state, "targets").glob("*.json"):
        (entry,) = json.loads(file.read_text())
        (address,) = entry["targets"]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        names = {family.name for family in text_string_to_metric_families(text)}
        found[entry["labels"]["service"]] = names
    assert found.keys() == {"tokenizer", "orchestrator", "shard"}
    assert {"fermata_token_latency_seconds", "fermata_token_part_seconds"} <= found["tokenizer"]
    assert {"fermata_commit_lag_seconds", "fermata_generations"} <= found["orchestrator"]
    assert {"fermata_step_duration_seconds", "fermata_kv_usage_ratio"} <= found["shard"]
