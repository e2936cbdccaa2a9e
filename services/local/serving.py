"""Whether a system serves, and what: asked over the public API, as any client would.

Knows the public `ModelService` and nothing of processes.
"""

from __future__ import annotations

import grpc

from fermata.v1 import model_pb2, model_pb2_grpc

_PROBE_SECONDS = 1.0
_WILDCARD, _LOOPBACK = "0.0.0.0", "127.0.0.1"


def served_model(address: str) -> model_pb2.Model | None:
    """The model that HOST:PORT serves; None while nobody answers.

    Its fingerprint is set once a shard is known: from then on a request would be served.
    """
    host, _, port = address.rpartition(":")
    target = f"{_LOOPBACK if host == _WILDCARD else host}:{port}"
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(target, options=options) as channel:
        try:
            models = model_pb2_grpc.ModelServiceStub(channel).ListModels(
                model_pb2.ListModelsRequest(), timeout=_PROBE_SECONDS
            )
        except grpc.RpcError:
            return None
    return next(iter(models.models), None)


def is_served(address: str) -> bool:
    """Whether a request to HOST:PORT would be served now."""
    model = served_model(address)
    return model is not None and model.HasField("fingerprint")
