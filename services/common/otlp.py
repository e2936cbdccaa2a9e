"""Spans as OTLP/JSON, the standard document that `fermata trace` draws and that other tools read.

It is written here and not with OpenTelemetry's encoder and protobuf's JSON, because a trace of 1,024 tokens takes five
times as long there, in a service that streams to others meanwhile; a test holds it to them. Knows neither
OpenTelemetry's classes nor who asks. Source of the format: `trace.proto` of opentelemetry-proto, and the section on
JSON of the OTLP specification: ids are hex, 64-bit integers are strings.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

from services.common.tracing import Attribute, Span, packed
from services.common.types import VERSION

SCOPE = "fermata"
"""Who made the spans and figures, as OpenTelemetry calls it."""

Resource = Mapping[str, str | int]
"""What the spans and figures of a process are about: the process."""

_HEAD, _TAIL = b'{"resourceSpans":[', b"]}"
_ERROR_STATUS = 2


def resource(service: str, *, instance_id: str, node: str) -> Resource:
    """The attributes of this process.

    Args:
        service: tokenizer, orchestrator or shard.
        instance_id: names the process among all of the service.
        node: name of its machine.
    """
    return {
        "service.namespace": "fermata",
        "service.name": f"fermata-{service}",
        "service.instance.id": instance_id,
        "service.version": VERSION,
        "host.name": node,
        "process.pid": os.getpid(),
    }


def write_document(process: Resource, spans: Iterable[Span]) -> bytes:
    """The spans of a process as one document."""
    entry = {
        "resource": {"attributes": _attributes(process)},
        "scopeSpans": [{"scope": {"name": SCOPE}, "spans": [_span(span) for span in spans]}],
    }
    return _HEAD + json.dumps(entry, separators=(",", ":")).encode() + _TAIL


def join_documents(documents: Iterable[bytes]) -> bytes:
    """One document with everything that is in several.

    They are joined as bytes: they can have megabytes, and nobody else's documents come here.

    Raises:
        ValueError: one of them was not made here.
    """
    entries = []
    for document in documents:
        if not (document.startswith(_HEAD) and document.endswith(_TAIL)):
            raise ValueError(f"not a trace document: {document[:40]!r}")
        if entry := document[len(_HEAD) : -len(_TAIL)]:
            entries.append(entry)
    return _HEAD + b",".join(entries) + _TAIL


def _span(span: Span) -> dict[str, Any]:
    """Fields that have their default value are left out, as protobuf does."""
    written: dict[str, Any] = {"traceId": span.context.trace_id.hex(), "spanId": span.context.span_id.hex()}
    if span.parent_id:
        written["parentSpanId"] = span.parent_id.hex()
    written |= {
        "name": span.name,
        "kind": int(span.kind),
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
    }
    if span.attributes:
        written["attributes"] = _attributes(span.attributes)
    if span.links:
        written["links"] = [{"traceId": link.trace_id.hex(), "spanId": link.span_id.hex()} for link in span.links]
    written["status"] = {"code": _ERROR_STATUS, "message": span.error} if span.error else {}
    return written


def _attributes(attributes: Mapping[str, Attribute]) -> list[dict[str, Any]]:
    return [{"key": name, "value": _value(value)} for name, value in attributes.items()]


def _value(value: Attribute) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, array):
        return {"stringValue": packed(value)}
    return {"arrayValue": {"values": [{"stringValue": item} for item in value]}}
