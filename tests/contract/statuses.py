"""What a failed call says of itself, read from the wire: `google.rpc.Status` in the trailers, by the public protos."""

from __future__ import annotations

from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import aio


def error_info(error: aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    """The ErrorInfo of Fermata; an empty one when gRPC itself spoke."""
    info = error_details_pb2.ErrorInfo()
    _unpack(error, info)
    return info if info.domain == "fermata" else error_details_pb2.ErrorInfo()


def retry_delay(error: aio.AioRpcError) -> float:
    """Seconds of the RetryInfo; 0 without one."""
    retry = error_details_pb2.RetryInfo()
    _unpack(error, retry)
    return float(retry.retry_delay.ToNanoseconds()) / 1e9


def _unpack(error: aio.AioRpcError, wanted: Message) -> None:
    """Fills the message from the detail of its type, if there is one."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)  # type: ignore[arg-type]  # a -bin key has bytes
            for detail in status.details:
                if detail.Is(wanted.DESCRIPTOR):
                    detail.Unpack(wanted)
