"""The trace of a generation, read back through the public API: whole, across all processes, and true."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from fermata import Tokens
from fermata.aio import AsyncClient
from fermata.errors import GenerationNotFound, InvalidRequest
from fermata.v1 import generation_pb2, telemetry_pb2
from fermata.v1.telemetry_pb2_grpc import TelemetryServiceStub
from services.common import rpc
from tests.pipeline.house import House

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUEST: dict[str, Any] = {"token_ids": [20, 30, 40, 50], "seed": 5, "ignore_eos": True, "max_tokens": 40}
TRACE = "0af7651916cd43dd8448eb211c80319c"


class Span:
    """A span of a document, with plain values."""

    def __init__(self, written: dict[str, Any], service: str) -> None:
        self.service = service
        self.name: str = written["name"]
        self.trace_id: str = written["traceId"]
        self.span_id: str = written["spanId"]
        self.parent_id: str = written.get("parentSpanId", "")
        self.start, self.end = int(written["startTimeUnixNano"]), int(written["endTimeUnixNano"])
        self.links = [link["spanId"] for link in written.get("links", ())]
        self.attributes = {item["key"]: plain(item["value"]) for item in written.get("attributes", ())}


def plain(value: dict[str, Any]) -> Any:
    """An attribute's value."""
    ((kind, given),) = value.items()
    if kind == "arrayValue":
        return [plain(item) for item in given["values"]]
    if kind == "stringValue" and given.startswith("["):
        return json.loads(given)
    return int(given) if kind == "intValue" else given


async def trace_of(house: House, generation_id: str) -> list[Span]:
    """All spans that the system remembers of a generation."""
    async with rpc.inside_channel(house.address) as channel:
        name = generation_pb2.GenerationName(generation_id=generation_id)
        answer = await TelemetryServiceStub(channel).GetTrace(telemetry_pb2.GetTraceRequest(generation=name))
    spans = []
    for entry in json.loads(answer.otlp_json)["resourceSpans"]:
        resource = {item["key"]: plain(item["value"]) for item in entry["resource"]["attributes"]}
        spans += [Span(span, resource["service.name"]) for scope in entry["scopeSpans"] for span in scope["spans"]]
    return spans


async def generated(house: House, **options: Any) -> tuple[str, int]:
    """A generation that was read to its end: its id and the number of its tokens."""
    count = 0
    async with AsyncClient(house.address) as client, client.stream(**REQUEST | options) as stream:
        async for event in stream:
            if isinstance(event, Tokens):
                count += len(event.token_ids)
        assert stream.generation_id is not None
        return stream.generation_id, count


async def test_one_trace_goes_through_all_processes(house: House) -> None:
    generation_id, count = await generated(house)
    spans = await trace_of(house, generation_id)
    steps = [span for span in spans if span.name == "step"]
    spans = [span for span in spans if span.name != "step"]
    assert {span.service for span in spans} == {"fermata-tokenizer", "fermata-orchestrator", "fermata-shard"}
    assert len({span.trace_id for span in spans}) == 1
    by_id = {span.span_id: span for span in spans}
    assert {span.name for span in spans} >= {"encode", "decode", "claim", "place", "own", "admission", "sequence"}
    roots = [span for span in spans if span.parent_id not in by_id]
    assert [root.name for root in roots] == ["fermata.v1.GenerationService/StreamGenerate"]
    (decode,) = [span for span in spans if span.name == "decode"]
    assert len(decode.attributes["fermata.token.departed_us"]) == count == 40
    assert decode.attributes["fermata.token.departed_us"] == sorted(decode.attributes["fermata.token.departed_us"])
    assert {span.attributes["fermata.step.number"] for span in steps} >= set(decode.attributes["fermata.token.step"])
    assert all(generation_id in span.attributes["fermata.step.generations"] for span in steps)
    forwards = {span.attributes["fermata.step.number"]: span.attributes["fermata.token.forward_us"] for span in steps}
    told = zip(decode.attributes["fermata.token.step"], decode.attributes["fermata.token.forward_us"], strict=True)
    assert all(forwards[step] == forward for step, forward in told)


async def test_the_parts_of_every_token_sum_to_its_interval(house: House) -> None:
    generation_id, _ = await generated(house)
    (decode,) = [span for span in await trace_of(house, generation_id) if span.name == "decode"]
    departed = decode.attributes["fermata.token.departed_us"]
    parts = [
        values
        for name, values in decode.attributes.items()
        if name.startswith("fermata.token.") and name.endswith("_us") and "departed" not in name
    ]
    for offset in range(1, 40):
        interval = departed[offset] - departed[offset - 1]
        assert abs(sum(values[offset] for values in parts) - interval) <= len(parts) + 1, "each is cut to microseconds"


async def test_a_callers_trace_is_joined(house: House) -> None:
    header = f"00-{TRACE}-b7ad6b7169203331-01"
    async with rpc.inside_channel(house.address) as channel:
        from fermata.v1.generation_pb2_grpc import GenerationServiceStub

        request = generation_pb2.GenerateRequest(generation=generation_pb2.GenerationRequest(prompt="hello"))
        request.generation.stop.max_tokens = 4
        answer = await GenerationServiceStub(channel).Generate(request, metadata=(("traceparent", header),))
    spans = [span for span in await trace_of(house, answer.started.generation_id) if span.name != "step"]
    assert {span.trace_id for span in spans} == {TRACE}
    assert [span.parent_id for span in spans if span.name.endswith("/Generate")] == ["b7ad6b7169203331"]
    (decode,) = [span for span in spans if span.name == "decode"]
    assert len(decode.attributes["fermata.token.departed_us"]) == len(answer.choices[0].token_ids)


async def test_a_takeover_is_linked_to_the_former_owner(house: House) -> None:
    house.drop_at("orchestrator.step", 20, house.drop_owner)
    generation_id, count = await generated(house)
    assert count == 40
    spans = await trace_of(house, generation_id)
    (takeover,) = [span for span in spans if span.name == "takeover"]
    (later,) = [span for span in spans if span.name == "own" and span.attributes["fermata.epoch"] > 1]
    assert takeover.parent_id == later.span_id
    assert takeover.links == later.links
    assert len(takeover.links) == 1


async def test_what_goes_on_after_a_pause_is_linked_to_the_ownership_before(house: House) -> None:
    async with AsyncClient(house.address) as client:
        stream = client.stream(**REQUEST | {"max_tokens": 300})
        async for _ in stream:
            if len(stream.token_ids) >= 5:
                break
        stream.leave()
        assert stream.generation_id is not None

        async def names() -> list[str]:
            return [span.name for span in await trace_of(house, stream.generation_id or "")]

        async with asyncio.timeout(20):
            while "own" not in await names():  # noqa: ASYNC110 - it is parked some time after nobody reads it
                await asyncio.sleep(0.1)
        async with client.resume(stream.generation_id) as resumed:
            async for _ in resumed:
                pass
        async with asyncio.timeout(20):
            while (await names()).count("own") < 2:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.1)
        spans = await trace_of(house, stream.generation_id)
    first, later = sorted((span for span in spans if span.name == "own"), key=lambda span: span.start)
    (went_on,) = [span for span in spans if span.name == "resume"]
    assert went_on.links == later.links == [first.span_id]
    assert went_on.parent_id == later.span_id


async def test_nobody_remembers_a_generation_that_never_was(house: House) -> None:
    with pytest.raises(GenerationNotFound, match="remembers"):
        async with AsyncClient(house.address) as client:
            await client.trace("a" * 26 + "." + "0" * 16)


async def test_all_processes_tell_what_they_count(house: House) -> None:
    async with AsyncClient(house.address) as client:
        with pytest.raises(InvalidRequest):
            await client.generate(token_ids=[20], temperature=-1.0)
        await generated(house)
        replicas = (await client.statistics()).replicas
    assert sorted(replica.service for replica in replicas) == 2 * ["orchestrator"] + ["shard"] + 2 * ["tokenizer"]
    (asked,) = [replica for replica in replicas if replica.address == house.address]
    figures = {figure.name: figure for figure in asked.figures}
    assert figures["fermata.calls.failed"].value == 1
    assert figures["fermata.calls.failed"].attributes == {"error_type": "INVALID_FIELD"}
    latency = next(figure for figure in asked.figures if figure.name == "fermata.token.latency")
    assert sum(latency.counts) >= 39
    told = {figure.name: figure.value for replica in replicas for figure in replica.figures}
    assert told["fermata.tokens.drawn"] >= 40
    assert told["fermata.kv.blocks"] > 0
