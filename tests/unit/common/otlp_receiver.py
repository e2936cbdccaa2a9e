"""A collector in this process: a real OTLP/gRPC server that keeps what it is sent.

Knows the protocol only, and nothing of who sends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, ResourceMetrics
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span


class Receiver:
    """What was received.

    Attributes:
        endpoint: for exporters.
        resource_spans, resource_metrics: as they came.
        messages: sizes of the messages with spans, in bytes.
        open: cleared by a test that wants calls to wait.
        failure: a status to answer with instead.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self.resource_spans: list[ResourceSpans] = []
        self.resource_metrics: list[ResourceMetrics] = []
        self.messages: list[int] = []
        self.failure: grpc.StatusCode | None = None
        self.open = threading.Event()
        self.open.set()

    @property
    def spans(self) -> list[Span]:
        return [span for process in self.resource_spans for scope in process.scope_spans for span in scope.spans]

    @property
    def metrics(self) -> dict[str, Metric]:
        """As they came last."""
        scopes = [scope for process in self.resource_metrics for scope in process.scope_metrics]
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    def admit(self, context: grpc.ServicerContext) -> None:
        self.open.wait()
        if self.failure is not None:
            context.abort(self.failure, "as the test wants it")


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def Export(self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any) -> Any:
        self._receiver.admit(context)
        self._receiver.messages.append(request.ByteSize())
        self._receiver.resource_spans += request.resource_spans
        return trace_service_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def Export(self, request: metrics_service_pb2.ExportMetricsServiceRequest, context: Any) -> Any:
        self._receiver.admit(context)
        self._receiver.resource_metrics += request.resource_metrics
        return metrics_service_pb2.ExportMetricsServiceResponse()


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver on a free port, with gRPC's own limit of 4 MiB for a message."""
    receiver = Receiver()
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Traces(receiver), server)  # type: ignore[no-untyped-call]
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_Metrics(receiver), server)  # type: ignore[no-untyped-call]
        receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield receiver
        finally:
            receiver.open.set()
            server.stop(None).wait()
