"""The trace that a call belongs to, where the program that makes it is traced (W3C Trace Context).

Knows OpenTelemetry only if the program has it: nothing is imported for this, and nothing is required.
"""

from __future__ import annotations

import sys


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """The `traceparent` of OpenTelemetry's current span as metadata of a call; empty without one."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return ()
    span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        return ()
    return (("traceparent", f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"),)
