"""A call belongs to the trace of the program that makes it, where there is one."""

from __future__ import annotations

import subprocess
import sys

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from fermata.trace_context import trace_metadata


def test_the_current_span_of_the_program_is_told() -> None:
    span = NonRecordingSpan(SpanContext(trace_id=0xAB, span_id=0xCD, is_remote=False, trace_flags=TraceFlags(1)))
    with trace.use_span(span):
        assert trace_metadata() == (("traceparent", f"00-{'ab':0>32}-{'cd':0>16}-01"),)
    assert trace_metadata() == ()


def test_a_program_without_opentelemetry_tells_nothing_and_imports_nothing() -> None:
    code = "import sys; from fermata.trace_context import trace_metadata as told; assert told() == ();"
    code += "import fermata.client; assert 'opentelemetry' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
