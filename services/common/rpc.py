"""gRPC as every service of the house uses it: channels, servers, and the one mapping of errors to statuses.

Knows transport only. Options and their reasons are in the constants below; handlers raise `FermataError`s and never
touch a status themselves.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc import aio

from services.common.errors import BY_REASON, DOMAIN, FermataError, FieldViolation, InternalError

log = logging.getLogger(__name__)

Context = aio.ServicerContext[Any, Any]
"""What every handler is given beside its request."""

STATUS_DETAILS_KEY = "grpc-status-details-bin"
OUTSIDE_MESSAGE_BYTES = 4 << 20
INSIDE_MESSAGE_BYTES = 64 << 20

# Without ping_timeout a stopped peer is never noticed; without keepalive ping_timeout does nothing (both measured).
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
]
# A server refuses pings oftener than every 5 minutes unless told otherwise, and cuts the connection.
_ACCEPT_PINGS = [
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
]


def inside_channel(address: str, interceptors: Sequence[aio.ClientInterceptor] = ()) -> aio.Channel:
    """A channel to another service of the system, with its own connection, that redials within a second."""
    return aio.insecure_channel(
        address,
        interceptors=list(interceptors),
        options=[
            *_KEEPALIVE,
            ("grpc.max_send_message_length", INSIDE_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", INSIDE_MESSAGE_BYTES),
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 500),
            ("grpc.enable_retries", 0),
        ],
    )


def inside_server(interceptors: Sequence[aio.ServerInterceptor] = ()) -> aio.Server:
    """A server for the other services; binds its port alone."""
    return aio.server(
        interceptors=[ErrorInterceptor(), *interceptors],
        options=[
            *_ACCEPT_PINGS,
            *_KEEPALIVE,
            ("grpc.so_reuseport", 0),
            ("grpc.max_send_message_length", INSIDE_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", INSIDE_MESSAGE_BYTES),
        ],
    )


def public_server(*, reuse_port: bool, interceptors: Sequence[aio.ServerInterceptor] = ()) -> aio.Server:
    """A server for clients. With `reuse_port` other processes may listen on the same port."""
    return aio.server(
        interceptors=[ErrorInterceptor(), *interceptors],
        options=[
            *_ACCEPT_PINGS,
            ("grpc.so_reuseport", int(reuse_port)),
            ("grpc.max_receive_message_length", OUTSIDE_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", 10000),
            ("grpc.keepalive_timeout_ms", 2000),
            ("grpc.http2.ping_timeout_ms", 2000),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )


def bind(server: aio.Server, host: str, port: int) -> int:
    """Binds a port and returns it.

    Raises:
        OSError: the port is taken.
    """
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}") from error
    if bound == 0:
        raise OSError(f"cannot listen on {host}:{port}")
    return bound


def to_status(error: FermataError) -> status_pb2.Status:
    """The rich status of an error: ErrorInfo, and BadRequest and RetryInfo where they apply (AIP-193)."""
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)]
    if error.violations:
        bad_request = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad_request.field_violations.add(field=violation.field, description=violation.description)
        details.append(bad_request)
    if error.retry_delay is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_delay * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code_pb2.Code.Value(error.status), message=error.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def from_status(status: status_pb2.Status) -> FermataError:
    """Inverse of `to_status`; an unknown reason gives an `InternalError`."""
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    retry_delay = None
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(bad_request.DESCRIPTOR):
            detail.Unpack(bad_request)
        elif detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            retry_delay = retry.retry_delay.ToNanoseconds() / 1e9
    kind = BY_REASON.get(info.reason, InternalError) if info.domain == DOMAIN else InternalError
    return kind(
        status.message,
        metadata=dict(info.metadata),
        violations=[FieldViolation(item.field, item.description) for item in bad_request.field_violations],
        retry_delay=retry_delay,
    )


def from_call_error(error: aio.AioRpcError) -> FermataError | None:
    """The error that the other service raised, or None when the call itself failed (link, deadline, cancel)."""
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_DETAILS_KEY:
            return from_status(status_pb2.Status.FromString(value))  # type: ignore[arg-type]
    return None


def internal_error(error: BaseException) -> InternalError:
    """Hides an unexpected exception behind an id that stands in the log with its traceback."""
    error_id = secrets.token_hex(4)
    log.error("unexpected error %s", error_id, exc_info=error)
    return InternalError(f"unexpected error, see {error_id} in the service's log", metadata={"error_id": error_id})


async def abort(context: aio.ServicerContext[Any, Any], error: FermataError) -> NoReturn:
    """Ends a call with the error's rich status."""
    status = to_status(error)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    await context.abort(code, error.message, ((STATUS_DETAILS_KEY, status.SerializeToString()),))


class WrappingInterceptor(aio.ServerInterceptor):
    """Something around every handler, whichever of the four kinds it is."""

    def wrap_unary(self, method: str, behavior: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Awaitable[Any]]:
        """What is done around a handler with one answer; `behavior` is a coroutine function."""
        raise NotImplementedError

    def wrap_stream(
        self, method: str, behavior: Callable[[Any, Any], AsyncIterator[Any]]
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        """What is done around a handler with many answers; `behavior` is an async generator function."""
        raise NotImplementedError

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handler."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        for kind, wrap, factory in (
            ("unary_unary", self.wrap_unary, grpc.unary_unary_rpc_method_handler),
            ("stream_unary", self.wrap_unary, grpc.stream_unary_rpc_method_handler),
            ("unary_stream", self.wrap_stream, grpc.unary_stream_rpc_method_handler),
            ("stream_stream", self.wrap_stream, grpc.stream_stream_rpc_method_handler),
        ):
            behavior = getattr(handler, kind)
            if behavior is not None:
                # The standard health and reflection servicers have other forms, and map their own errors.
                form = inspect.isasyncgenfunction if kind.endswith("stream") else inspect.iscoroutinefunction
                if not form(behavior):
                    return handler
                wrapped = wrap(handler_call_details.method, behavior)
                return factory(wrapped, handler.request_deserializer, handler.response_serializer)
        return handler


class ErrorInterceptor(WrappingInterceptor):
    """Turns exceptions of handlers into statuses, in one place, for all kinds of calls."""

    def wrap_unary(self, method: str, behavior: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Awaitable[Any]]:
        """Around a handler with one answer."""

        async def wrapped(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            try:
                return await behavior(request, context)
            except FermataError as error:
                await abort(context, error)
            except (asyncio.CancelledError, aio.AbortError):
                raise
            except Exception as error:
                await abort(context, internal_error(error))

        return wrapped

    def wrap_stream(
        self, method: str, behavior: Callable[[Any, Any], AsyncIterator[Any]]
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        """Around a handler with many answers."""

        async def wrapped(request: Any, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            responses = behavior(request, context)
            try:
                async for response in responses:
                    yield response
            except FermataError as error:
                await abort(context, error)
            except (asyncio.CancelledError, GeneratorExit, aio.AbortError):
                raise
            except Exception as error:
                await abort(context, internal_error(error))
            finally:
                # Runs the handler's own clean-up at once when the call ends in the middle of a yield.
                await responses.aclose()  # type: ignore[attr-defined]

        return wrapped
