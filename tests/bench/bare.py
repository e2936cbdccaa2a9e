"""`python -m tests.bench.bare`: gRPC and nothing else, to know what one message per token costs by itself here.

A server of the public stream that sends one made-up token per stream and step, all streams in the same moment, at the
pace that it is asked for. What the house adds is the difference to it.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator

from fermata.v1 import generation_pb2
from fermata.v1.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from services.common import process, rpc


class BareService(GenerationServiceServicer):  # type: ignore[misc]  # its other calls stay abstract
    """Answers `request_id` = "SECONDS PER STEP" with `max_tokens` messages."""

    async def StreamGenerate(
        self, request: generation_pb2.StreamGenerateRequest, context: rpc.Context
    ) -> AsyncIterator[generation_pb2.StreamGenerateResponse]:
        """One token per step; the steps of all streams of a pace fall together."""
        loop, pace = asyncio.get_running_loop(), float(request.generation.request_id)
        response = generation_pb2.StreamGenerateResponse()
        response.event.tokens.token_ids.append(1000)
        response.event.tokens.text = " word"
        response.event.tokens.running_hash = bytes(8)
        for offset in range(request.generation.stop.max_tokens):
            await asyncio.sleep(pace - loop.time() % pace)
            response.event.tokens.first_offset = offset
            yield response


async def serve(ready_fd: int) -> None:
    """Serves until a signal."""
    server = rpc.inside_server()
    add_GenerationServiceServicer_to_server(BareService(), server)  # type: ignore[abstract]
    serving = process.Serving((rpc.bind(server, "127.0.0.1", 0),), lambda: {})
    await process.run(server, serving, process.SignalHost(ready_fd))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ready-fd", type=int, required=True)
    asyncio.run(serve(parser.parse_args().ready_fd))
