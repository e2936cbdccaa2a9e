"""Calls as spans, and the trace that they belong to, handed from caller to server (W3C Trace Context).

OpenTelemetry's own interceptor for gRPC breaks handlers that write to their context, and knows the names of before.
This one reads and writes `traceparent`; what is multiplexed on a persistent stream carries its context in its messages.
Knows calls and spans, no service.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import aio

from services.common import attributes as names
from services.common.errors import FermataError
from services.common.rpc import Context, WrappingInterceptor
from services.common.telemetry import Telemetry
from services.common.tracing import (
    Attribute,
    Span,
    SpanKind,
    TracedCall,
    begin_call,
    current_call,
    new_trace,
    parse_traceparent,
    since_epoch,
)

TRACEPARENT = "traceparent"
_NOT_TRACED = ("/grpc.", "/fermata.v1.TelemetryService/")
"""Calls that look at the system rather than use it."""


class TraceInterceptor(WrappingInterceptor):
    """Makes a span of each call that a server answers, and hands the context to what the call does.

    Args:
        telemetry: takes the spans.
        begins_traces: a call without a context begins a trace, as those of users do; otherwise it is none of a request.
        on_failed: told the reason of each call that ends with an error.
    """

    def __init__(
        self, telemetry: Telemetry, *, begins_traces: bool, on_failed: Callable[[str], object] = lambda _: None
    ) -> None:
        self._telemetry = telemetry
        self._begins_traces = begins_traces
        self._on_failed = on_failed

    def wrap_unary(self, method: str, behavior: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Awaitable[Any]]:
        """Around a handler with one answer."""

        async def wrapped(request: Any, context: Context) -> Any:
            with self._span(method, context):
                return await behavior(request, context)

        return wrapped

    def wrap_stream(
        self, method: str, behavior: Callable[[Any, Any], AsyncIterator[Any]]
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        """Around a handler with many answers."""

        async def wrapped(request: Any, context: Context) -> AsyncIterator[Any]:
            responses = behavior(request, context)
            with self._span(method, context):
                try:
                    async for response in responses:
                        yield response
                finally:
                    await responses.aclose()  # type: ignore[attr-defined]

        return wrapped

    @contextmanager
    def _span(self, method: str, context: Context) -> Iterator[None]:
        served = None if method.startswith(_NOT_TRACED) else self._begin(context)
        if served is None:
            yield
            return
        began = time.monotonic_ns()
        status, reason = "OK", ""
        try:
            yield
        except FermataError as error:
            status, reason = error.status, error.reason
            raise
        except (asyncio.CancelledError, GeneratorExit):
            status = "CANCELLED"
            raise
        except BaseException:
            status = reason = "INTERNAL"
            raise
        finally:
            for span in (*served.made, _Call(method, SpanKind.SERVER, served, began).span(status, reason)):
                self._telemetry.record(served.generation_id, span)
            if reason:
                self._on_failed(reason)

    def _begin(self, context: Context) -> TracedCall | None:
        """What the call's span is; None when it has no trace."""
        parent = None
        for key, value in context.invocation_metadata() or ():
            if key == TRACEPARENT and isinstance(value, str):
                parent = parse_traceparent(value)
        if parent is not None:
            served = TracedCall(parent.child(), parent.span_id)
        elif self._begins_traces:
            served = TracedCall(new_trace(sampled=random.random() < self._telemetry.settings.trace_share))
        else:
            return None
        begin_call(served)
        return served


class TraceClientInterceptor(aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    """Hands the context of the call that is served here to the one that is made for it."""

    async def intercept_unary_unary(
        self,
        continuation: Callable[[aio.ClientCallDetails, Any], Awaitable[aio.UnaryUnaryCall[Any, Any]]],
        client_call_details: aio.ClientCallDetails,
        request: Any,
    ) -> aio.UnaryUnaryCall[Any, Any]:
        """Adds the header, and makes a span when the call is over."""
        served = current_call()
        if served is None:
            return await continuation(client_call_details, request)
        made = TracedCall(served.context.child(), served.context.span_id)
        metadata = aio.Metadata(*(client_call_details.metadata or ()), (TRACEPARENT, made.context.traceparent))
        given = client_call_details
        details = aio.ClientCallDetails(given.method, given.timeout, metadata, given.credentials, given.wait_for_ready)
        method = given.method.decode() if isinstance(given.method, bytes) else given.method
        noted = _Call(method, SpanKind.CLIENT, made, time.monotonic_ns())
        call = await continuation(details, request)

        async def note() -> None:
            code = await call.code()
            failure = "" if code is grpc.StatusCode.OK else code.name
            served.made.append(noted.span(code.name, failure))

        call.add_done_callback(lambda _: _keep(asyncio.ensure_future(note())))
        return call


_noting: set[asyncio.Future[None]] = set()
"""What is under way; the loop alone would forget it."""


def _keep(task: asyncio.Future[None]) -> None:
    _noting.add(task)
    task.add_done_callback(_noting.discard)


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that began at `began_ns`, on this process's monotonic clock."""

    method: str
    kind: SpanKind
    traced: TracedCall
    began_ns: int

    def span(self, status: str, error: str) -> Span:
        """The call as it ended just now."""
        name = self.method.removeprefix("/")
        attributes: dict[str, Attribute] = {names.RPC_SYSTEM: "grpc", names.RPC_METHOD: name, names.RPC_STATUS: status}
        if error:
            attributes[names.ERROR_TYPE] = error
        return Span(
            name,
            self.traced.context,
            self.traced.parent_id,
            since_epoch(self.began_ns),
            since_epoch(time.monotonic_ns()),
            kind=self.kind,
            attributes=attributes,
            error=error,
        )
