"""The trace that a call belongs to, in the compact form that services hand on (W3C Trace Context, level 1)."""

from __future__ import annotations

import re

from services.common import rpc

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


def trace_context(context: rpc.Context) -> bytes:
    """16 bytes trace id, 8 bytes span id and 1 byte flags of a call's `traceparent`; empty without a valid one."""
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent" and isinstance(value, str):
            match = _TRACEPARENT.fullmatch(value)
            return bytes.fromhex("".join(match.groups())) if match else b""
    return b""
