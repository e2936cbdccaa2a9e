"""The cost of a token in the client, besides gRPC's own: a client must not eat what the engine gained."""

from __future__ import annotations

import time

from fermata.running_hash import EMPTY_HASH, extend_hash
from fermata.stream import StreamState
from fermata.v1 import generation_pb2

MOST_MICROSECONDS = 25.0


def test_cost_of_a_tokens_event() -> None:
    count = 2000
    messages = []
    running_hash = EMPTY_HASH
    for offset in range(count):
        running_hash = extend_hash(running_hash, offset)
        tokens = generation_pb2.Tokens(
            first_offset=offset, token_ids=[offset], text=" word", durable_count=offset, running_hash=running_hash
        )
        event = generation_pb2.GenerationEvent(tokens=tokens)
        messages.append(generation_pb2.StreamGenerateResponse(event=event).SerializeToString())
    best = float("inf")
    for _ in range(5):
        stream = StreamState(generation_pb2.GenerationRequest(), give_up_after=60.0)
        responses = [generation_pb2.StreamGenerateResponse.FromString(message) for message in messages]
        begin = time.process_time()
        for response in responses:
            stream._receive(response.event)
        best = min(best, (time.process_time() - begin) / count * 1e6)
        assert stream.cursors == {0: count}
    assert best < MOST_MICROSECONDS
