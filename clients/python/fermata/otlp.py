"""Reads OTLP/JSON documents into plain spans.

Knows the format alone: `TracesData` of opentelemetry-proto in the JSON that OTLP defines (ids in hexadecimal, 64-bit
numbers as strings), one document or, as collectors write their files, one a line. Knows nothing of generations.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Attribute = bool | int | float | str | tuple[bool | int | float | str, ...]
"""What an attribute can be."""

CLIENT_KIND = 3
_FAILED = 2  # STATUS_CODE_ERROR


@dataclass(frozen=True, slots=True)
class Span:
    """Something that was done, with its begin and its end.

    Attributes:
        name: what was done.
        service: what did it: the process's `service.name`.
        trace_id, span_id, parent_id: in hexadecimal; the last is empty for a root.
        kind: OTLP's number.
        start_ns, end_ns: nanoseconds since the epoch, on the clock of its machine.
        attributes: what else is known.
        error: why it failed; empty when it did not.
    """

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Attribute]
    error: str

    def text(self, name: str) -> str:
        """A single attribute as text; empty when there is none."""
        value = self.attributes.get(name, "")
        return "" if isinstance(value, tuple) else str(value)

    def integer(self, name: str) -> int | None:
        """An attribute that is a whole number."""
        value = self.attributes.get(name)
        return value if isinstance(value, int) else None

    def texts(self, name: str) -> tuple[str, ...]:
        """An array, each as text."""
        value = self.attributes.get(name)
        return tuple(map(str, value)) if isinstance(value, tuple) else ()

    def integers(self, name: str) -> tuple[int, ...]:
        """An array of whole numbers, as an array or as the text of one in JSON."""
        value: object = self.attributes.get(name)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        return tuple(item for item in value if isinstance(item, int)) if isinstance(value, (tuple, list)) else ()


def read_spans(document: bytes | str) -> list[Span]:
    """The spans of a document, in its order.

    Raises:
        ValueError: it is none.
    """
    try:
        text = document if isinstance(document, str) else document.decode()
        return [span for value in _values(text) for span in _spans(value)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # Whatever its shape lacks: who reads this cannot do more about one than about another.
        raise ValueError("this is not a document of spans in OTLP/JSON") from error


def _values(text: str) -> Iterator[Any]:
    """The one JSON value of a text, or that of each line."""
    try:
        yield json.loads(text)
    except json.JSONDecodeError:
        if not (lines := [line for line in text.splitlines() if line.strip()]):
            raise
        yield from map(json.loads, lines)


def _spans(document: Any) -> Iterator[Span]:
    for of_resource in document["resourceSpans"]:
        service = str(_attributes(of_resource.get("resource", {})).get("service.name", ""))
        for of_scope in of_resource.get("scopeSpans", ()):
            for span in of_scope.get("spans", ()):
                yield _span(span, service.rpartition("-")[2])


def _span(span: Any, service: str) -> Span:
    attributes = _attributes(span)
    status = span.get("status", {})
    failed = status.get("code") == _FAILED
    return Span(
        name=span["name"],
        service=service,
        trace_id=span["traceId"].lower(),
        span_id=span["spanId"].lower(),
        parent_id=span.get("parentSpanId", "").lower(),
        kind=span.get("kind", 0),
        start_ns=int(span["startTimeUnixNano"]),
        end_ns=int(span["endTimeUnixNano"]),
        attributes=attributes,
        error=(status.get("message") or str(attributes.get("error.type", "it failed"))) if failed else "",
    )


def _attributes(owner: Any) -> dict[str, Attribute]:
    read = {item["key"]: _attribute(item.get("value", {})) for item in owner.get("attributes", ())}
    return {key: value for key, value in read.items() if value is not None}


def _attribute(value: Any) -> Attribute | None:
    """An attribute's value; None for the kinds that no span of ours has."""
    if "arrayValue" in value:
        items = (_attribute(item) for item in value["arrayValue"].get("values", ()))
        return tuple(item for item in items if item is not None and not isinstance(item, tuple))
    if "intValue" in value:
        return int(value["intValue"])
    if "doubleValue" in value:
        return float(value["doubleValue"])
    found: bool | str | None = value.get("stringValue", value.get("boolValue"))
    return found
