"""The light client of Fermata: generates text over gRPC and goes on by itself where it was interrupted.

    from fermata import Client

    with Client("127.0.0.1:7433") as client:
        for event in client.stream("The quick brown fox", max_tokens=32):
            print(event.text, end="", flush=True)

`AsyncClient` is the same with `await`. `fermata.errors` has the tree of errors.
"""

from fermata.aio import AsyncClient
from fermata.aio_drift import measure_drift
from fermata.aio_stream import AsyncStream
from fermata.client import Client
from fermata.drift import DriftCurve, DriftIds, DriftSpan, DriftText
from fermata.errors import FermataError
from fermata.events import (
    Choice,
    Event,
    Fingerprint,
    Finished,
    FinishReason,
    Generation,
    Started,
    Tokens,
    TopLogprobs,
    Usage,
)
from fermata.records import (
    GenerationState,
    Model,
    RenderedPrompt,
    Session,
    SessionGeneration,
    SessionState,
    StoredGeneration,
    TokenPiece,
)
from fermata.requests import Messages, Options
from fermata.sync_stream import Stream
from fermata.timings import TokenTimings

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Choice",
    "Client",
    "DriftCurve",
    "DriftIds",
    "DriftSpan",
    "DriftText",
    "Event",
    "FermataError",
    "Fingerprint",
    "FinishReason",
    "Finished",
    "Generation",
    "GenerationState",
    "Messages",
    "Model",
    "Options",
    "RenderedPrompt",
    "Session",
    "SessionGeneration",
    "SessionState",
    "Started",
    "StoredGeneration",
    "Stream",
    "TokenPiece",
    "TokenTimings",
    "Tokens",
    "TopLogprobs",
    "Usage",
    "measure_drift",
]
