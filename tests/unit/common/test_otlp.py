"""The document is what OpenTelemetry's own encoder and protobuf's own JSON make of the same spans."""

from __future__ import annotations

import base64
import json
import os
from array import array
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as some
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from opentelemetry.sdk.resources import Resource

from services.common import otlp
from services.common.sdk_objects import readable_span
from services.common.tracing import Attribute, Span, SpanKind, TraceContext
from services.common.types import VERSION

PROCESS = otlp.resource("shard", instance_id="c0ffee", node="elsewhere")

numbers = some.integers(-(2**63), 2**63 - 1)
attribute_maps = some.dictionaries(
    some.text(min_size=1),
    some.booleans()
    | numbers
    | some.floats(allow_nan=False, allow_infinity=False)
    | some.text()
    | some.lists(some.text())
    | some.lists(some.integers(-(2**31), 2**31 - 1)).map(lambda values: array("i", values)),
)
contexts = some.builds(
    TraceContext,
    some.binary(min_size=16, max_size=16).filter(any),
    some.binary(min_size=8, max_size=8).filter(any),
    some.just(1),
)
spans = some.builds(
    Span,
    some.text(),
    contexts,
    some.just(b"") | some.binary(min_size=8, max_size=8).filter(any),
    some.integers(0, 2**63),
    some.integers(0, 2**63),
    some.sampled_from(SpanKind),
    attribute_maps,
    some.lists(contexts),
    some.text(),
)


def parsed(document: bytes) -> TracesData:
    """Protobuf's JSON has bytes in base64, OTLP has ids in hex."""

    def repair(found: dict[str, Any]) -> dict[str, Any]:
        for name in found.keys() & {"traceId", "spanId", "parentSpanId"}:
            found[name] = base64.b64encode(bytes.fromhex(found[name])).decode()
        return found

    return json_format.ParseDict(json.loads(document, object_hook=repair), TracesData())


@given(some.lists(spans, max_size=3))
def test_it_says_what_the_library_says(made: list[Span]) -> None:
    process = Resource(PROCESS)
    encoded = encode_spans([readable_span(span, process) for span in made])
    for span in (span for entry in encoded.resource_spans for scope in entry.scope_spans for span in scope.spans):
        span.flags = 0  # they say that parents and links are in the same process, which nobody knows
        for link in span.links:
            link.flags = 0
    written = parsed(otlp.write_document(PROCESS, made))
    if made:
        assert written == TracesData(resource_spans=encoded.resource_spans)
    else:
        assert not written.resource_spans[0].scope_spans[0].spans


def test_ids_are_hex_and_large_numbers_are_text() -> None:
    context = TraceContext(bytes(15) + b"\xab", bytes(7) + b"\xcd", 1)
    link = TraceContext(bytes(15) + b"\x01", bytes(7) + b"\x02", 1)
    attributes: dict[str, Attribute] = {"steps": array("i", [1, -2]), "shards": ["71"], "number": 2**40}
    span = Span("step", context, bytes(7) + b"\xef", 10**18, 10**18 + 1, attributes=attributes, links=[link])
    document = json.loads(otlp.write_document(PROCESS, [span]))
    assert document["resourceSpans"][0]["scopeSpans"] == [
        {
            "scope": {"name": "fermata"},
            "spans": [
                {
                    "traceId": "0" * 30 + "ab",
                    "spanId": "0" * 14 + "cd",
                    "parentSpanId": "0" * 14 + "ef",
                    "name": "step",
                    "kind": 1,
                    "startTimeUnixNano": "1000000000000000000",
                    "endTimeUnixNano": "1000000000000000001",
                    "attributes": [
                        {"key": "steps", "value": {"stringValue": "[1, -2]"}},
                        {"key": "shards", "value": {"arrayValue": {"values": [{"stringValue": "71"}]}}},
                        {"key": "number", "value": {"intValue": str(2**40)}},
                    ],
                    "links": [{"traceId": "0" * 31 + "1", "spanId": "0" * 15 + "2"}],
                    "status": {},
                }
            ],
        }
    ]


def test_a_process_says_who_it_is() -> None:
    assert dict(PROCESS) == {
        "service.namespace": "fermata",
        "service.name": "fermata-shard",
        "service.instance.id": "c0ffee",
        "service.version": VERSION,
        "host.name": "elsewhere",
        "process.pid": os.getpid(),
    }


@given(some.lists(some.lists(spans, max_size=2), max_size=3))
def test_documents_are_joined(parts: list[list[Span]]) -> None:
    documents = [otlp.write_document(PROCESS, part) for part in parts]
    joined = otlp.join_documents(documents)
    assert json.loads(joined) == {
        "resourceSpans": [entry for document in documents for entry in json.loads(document)["resourceSpans"]]
    }
    assert json.loads(otlp.join_documents([joined, otlp.join_documents([]), joined])) == {
        "resourceSpans": json.loads(joined)["resourceSpans"] * 2
    }


def test_what_is_no_document_is_not_joined() -> None:
    with pytest.raises(ValueError, match="not a trace document"):
        otlp.join_documents([otlp.write_document(PROCESS, []), b'{"other": []}'])
