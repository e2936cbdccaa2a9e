"""Opening a generation: from a checked request to a name that can be read, whoever of the orchestrators answers.

Knows the Open call and its idempotence; neither prompts (see `prompts.py`) nor streams.
"""

from __future__ import annotations

import secrets
import time
from typing import NamedTuple

from fermata.v1 import generation_pb2
from services.common import failpoints
from services.common.errors import FermataError, RequestIdReused
from services.common.timings import CallMoments
from services.common.tracing import current_call, new_trace
from services.common.types import DEFAULT_TENANT, pack_ids
from services.orchestrator.v1 import orchestrator_pb2
from services.tokenizer.codec import Codec
from services.tokenizer.orchestrators import Orchestrators
from services.tokenizer.prompts import Prompt, Prompter, in_thread_if_long
from services.tokenizer.requests import request_hash, spec_of
from services.tokenizer.validation import check_generation


class Opened(NamedTuple):
    """A generation that exists.

    Attributes:
        name: how it is read.
        address: the orchestrator that opened it; empty when that is not known.
        call: when it was asked for; None when an earlier call had made it.
    """

    name: orchestrator_pb2.Name
    address: str
    call: CallMoments | None = None


class Opener:
    """Opens generations for the calls of this process."""

    def __init__(self, codec: Codec, orchestrators: Orchestrators) -> None:
        self._codec = codec
        self._orchestrators = orchestrators
        self._prompter = Prompter(codec, orchestrators)

    async def open(self, request: generation_pb2.GenerationRequest) -> Opened:
        """Opens a generation, or finds the one that this request made before (R14).

        Raises:
            InvalidRequest, ModelNotFound, NotYetSupported: the request cannot be served.
            FermataError: what `Prompter.prompt_of` and the orchestrator say.
        """
        arrived_ns = time.monotonic_ns()
        await in_thread_if_long(request.ByteSize(), check_generation, request, self._codec.facts)
        try:
            prompt = await self._prompter.prompt_of(request)
            return await self._open(request, prompt, arrived_ns)
        except RequestIdReused:
            raise
        except FermataError:
            # A retry sees the session with its own generation in it, and may be refused for that.
            found = await self._earlier(request) if request.request_id and request.session_id else None
            if found is None:
                raise
            return found

    async def _open(self, request: generation_pb2.GenerationRequest, prompt: Prompt, arrived_ns: int) -> Opened:
        message = orchestrator_pb2.OpenRequest(
            tenant=DEFAULT_TENANT,
            # A name of its own for every call: a second attempt at another orchestrator then finds the first one's.
            request_id=request.request_id or f"fermata-{secrets.token_hex(16)}",
            request_hash=request_hash(request),
            session_id=request.session_id,
            prompt_token_ids=pack_ids(prompt.token_ids),
            messages=prompt.messages,
            spec=spec_of(request, self._codec),
            labels=request.labels,
            generation_count=prompt.generation_count,
            expected_position=prompt.position if request.HasField("expected_position") else None,
        )
        if prompt.parent.generation_id:
            message.parent.generation_id = prompt.parent.generation_id
            message.parent.choice = prompt.parent.choice
            message.parent.count = prompt.parent.count
        served = current_call()
        context = served.context.child() if served is not None else new_trace(sampled=False)
        message.spec.trace_context = context.pack()
        failpoints.hit("tokenizer.open.before")
        call = CallMoments(arrived_ns, prompt.render_ns, prompt.encode_ns, time.monotonic_ns())
        answer, address = await self._orchestrators.call_with_address(
            lambda stub: stub.Open, message, key=message.session_id or message.request_id
        )
        failpoints.hit("tokenizer.open.after")
        name = orchestrator_pb2.Name(tenant=DEFAULT_TENANT, generation_id=answer.generation_id)
        return Opened(name, address, call if answer.created else None)

    async def _earlier(self, request: generation_pb2.GenerationRequest) -> Opened | None:
        """The generation that an earlier attempt of this request opened."""
        name = orchestrator_pb2.Name(
            tenant=DEFAULT_TENANT, request_id=request.request_id, session_id=request.session_id
        )
        ask = orchestrator_pb2.GetGenerationRequest(name=name)
        try:
            stored, address = await self._orchestrators.call_with_address(
                lambda stub: stub.GetGeneration, ask, key=request.session_id
            )
        except FermataError:
            return None
        found = orchestrator_pb2.Name(tenant=DEFAULT_TENANT, generation_id=stored.opened.generation_id)
        return Opened(found, address)
