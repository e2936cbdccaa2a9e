"""Documents in OTLP/JSON become spans; what is none is refused in one line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fermata.otlp import read_spans

SPAN: dict[str, Any] = {
    "traceId": "0AF7651916CD43DD8448EB211C80319C",
    "spanId": "B7AD6B7169203331",
    "name": "step",
    "kind": 1,
    "startTimeUnixNano": "1760000000000000001",
    "endTimeUnixNano": "1760000000000000003",
}


def document(**changes: Any) -> dict[str, Any]:
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "fermata-shard"}}]}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {}, "spans": [{**SPAN, **changes}]}]}]}


def test_a_span() -> None:
    attributes = [
        {"key": "text", "value": {"stringValue": "a"}},
        {"key": "number", "value": {"intValue": "-12"}},
        {"key": "plain number", "value": {"intValue": 7}},
        {"key": "share", "value": {"doubleValue": 0.5}},
        {"key": "yes", "value": {"boolValue": False}},
        {"key": "numbers", "value": {"arrayValue": {"values": [{"intValue": "3"}, {"intValue": "-1"}]}}},
        {"key": "packed", "value": {"stringValue": "[3,-1]"}},
        {"key": "texts", "value": {"arrayValue": {"values": [{"stringValue": "x"}]}}},
        {"key": "empty", "value": {"arrayValue": {}}},
        {"key": "of another kind", "value": {"bytesValue": "AA=="}},
    ]
    (span,) = read_spans(json.dumps(document(attributes=attributes, parentSpanId="00F067AA0BA902B7")))
    assert (span.name, span.service, span.kind, span.error) == ("step", "shard", 1, "")
    assert (span.trace_id, span.span_id) == (SPAN["traceId"].lower(), SPAN["spanId"].lower())
    assert span.parent_id == "00f067aa0ba902b7"
    assert (span.start_ns, span.end_ns) == (1_760_000_000_000_000_001, 1_760_000_000_000_000_003)
    assert (span.integer("number"), span.integer("plain number"), span.integer("text")) == (-12, 7, None)
    assert (span.text("text"), span.text("number"), span.text("numbers"), span.text("nothing")) == ("a", "-12", "", "")
    assert span.integers("numbers") == span.integers("packed") == (3, -1)
    assert [span.integers(name) for name in ("empty", "number", "text", "nothing")] == [()] * 4
    assert (span.texts("texts"), span.texts("numbers")) == (("x",), ("3", "-1"))
    assert (span.attributes["share"], span.attributes["yes"]) == (0.5, False)
    assert "of another kind" not in span.attributes


@pytest.mark.parametrize(
    ("status", "attributes", "error"),
    [
        ({}, [], ""),
        ({"code": 1}, [], ""),
        ({"code": 2, "message": "gone"}, [], "gone"),
        ({"code": 2}, [{"key": "error.type", "value": {"stringValue": "OVERLOADED"}}], "OVERLOADED"),
        ({"code": 2}, [], "it failed"),
    ],
)
def test_failures(status: dict[str, Any], attributes: list[Any], error: str) -> None:
    (span,) = read_spans(json.dumps(document(status=status, attributes=attributes)))
    assert span.error == error


def test_a_document_of_a_collector_is_one_a_line() -> None:
    lines = "\n".join(json.dumps(document(name=name)) for name in ("one", "two")) + "\n\n"
    assert [span.name for span in read_spans(lines.encode())] == ["one", "two"]


def test_a_document_without_spans() -> None:
    assert read_spans(b'{"resourceSpans": []}') == []
    assert read_spans(b'{"resourceSpans": [{"scopeSpans": [{}]}, {}]}') == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"{}",
        b'{"resourceSpans": 3}',
        b'{"resourceSpans": [3]}',
        json.dumps(document(traceId=None)).encode(),
        json.dumps(document(startTimeUnixNano="soon")).encode(),
        json.dumps(document(attributes=[{"value": {}}])).encode(),
    ],
)
def test_what_is_no_document(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"^this is not a document of spans in OTLP/JSON$"):
        read_spans(text)
