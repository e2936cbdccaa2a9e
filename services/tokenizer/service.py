"""The public API: check, call the room behind, answer. Errors are mapped by the interceptor of `rpc.py`.

Knows messages and calls; decides nothing about text, sessions or streams.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

from fermata.v1 import generation_pb2, model_pb2, session_pb2, text_pb2
from fermata.v1.generation_pb2_grpc import GenerationServiceServicer
from fermata.v1.model_pb2_grpc import ModelServiceServicer
from fermata.v1.session_pb2_grpc import SessionServiceServicer
from fermata.v1.text_pb2_grpc import TokenizerServiceServicer
from services.common import rpc
from services.common.errors import Draining, FermataError, NotYetSupported
from services.common.types import DEFAULT_TENANT
from services.orchestrator.v1 import orchestrator_pb2
from services.tokenizer import events, validation
from services.tokenizer.chat_template import text_of
from services.tokenizer.codec import Codec
from services.tokenizer.opening import Opener
from services.tokenizer.orchestrators import Orchestrators
from services.tokenizer.prompts import in_thread_if_long, render
from services.tokenizer.reader import Target
from services.tokenizer.readers import Readers
from services.tokenizer.requests import conversation_of, default_sampling, internal_name, placement_key

log = logging.getLogger(__name__)

MODEL_CACHE_SECONDS = 1.0
"""Seconds that what orchestrators say of the shards is believed."""
MODEL_PATIENCE = 0.5
"""Seconds that a question about the model waits for an orchestrator; without one the answer has no fingerprint."""


class GenerationService(GenerationServiceServicer):
    """Generates, resumes, cancels."""

    def __init__(self, codec: Codec, orchestrators: Orchestrators, readers: Readers) -> None:
        self._codec = codec
        self._orchestrators = orchestrators
        self._readers = readers
        self._opener = Opener(codec, orchestrators)

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: rpc.Context
    ) -> generation_pb2.GenerateResponse:
        """Generates and returns the whole result."""
        self._refuse_when_draining()
        opened = await self._opener.open(request.generation)
        target = Target(opened.name, call=opened.call)
        with self._readers.open(target, first=opened.address, on_slow=_end_later(context)) as reader:
            return await reader.collect()

    async def StreamGenerate(
        self, request: generation_pb2.StreamGenerateRequest, context: rpc.Context
    ) -> AsyncIterator[generation_pb2.StreamGenerateResponse]:
        """Generates and streams events."""
        self._refuse_when_draining()
        opened = await self._opener.open(request.generation)
        target = Target(opened.name, call=opened.call)
        with self._readers.open(target, first=opened.address, on_slow=_end_later(context)) as reader:
            while await reader.wait():
                for response in reader.take(generation_pb2.StreamGenerateResponse):
                    yield response

    async def Resume(
        self, request: generation_pb2.ResumeRequest, context: rpc.Context
    ) -> AsyncIterator[generation_pb2.ResumeResponse]:
        """Reads a generation from a cursor on, and continues it where it was left."""
        self._refuse_when_draining()
        validation.check_resume(request, self._codec.facts)
        name = internal_name(request.generation)
        self._readers.face.figures.resumed()
        target = Target(name, request.cursors, request.tails)
        with self._readers.open(target, on_slow=_end_later(context)) as reader:
            while await reader.wait():
                for response in reader.take(generation_pb2.ResumeResponse):
                    yield response

    async def Cancel(
        self, request: generation_pb2.CancelRequest, context: rpc.Context
    ) -> generation_pb2.CancelResponse:
        """Ends a generation for all readers."""
        validation.check_name(request.generation)
        name = internal_name(request.generation)
        answer = await self._orchestrators.call(
            lambda stub: stub.Cancel, orchestrator_pb2.CancelRequest(name=name), key=placement_key(name)
        )
        response = generation_pb2.CancelResponse()
        for terminal in answer.terminals:
            events.write_finished(response.finished.add(), terminal)
        return response

    async def GetGeneration(
        self, request: generation_pb2.GetGenerationRequest, context: rpc.Context
    ) -> generation_pb2.GetGenerationResponse:
        """Describes a generation and returns the tokens that its log has."""
        validation.check_name(request.generation)
        name = internal_name(request.generation)
        stored = await self._orchestrators.call(
            lambda stub: stub.GetGeneration, orchestrator_pb2.GetGenerationRequest(name=name), key=placement_key(name)
        )
        face = self._readers.face
        return events.stored_generation(
            stored, face.vocabulary, eos_token_ids=face.eos_token_ids, endpoints=face.endpoints
        )

    async def ListGenerations(
        self, request: generation_pb2.ListGenerationsRequest, context: rpc.Context
    ) -> generation_pb2.ListGenerationsResponse:
        """Not supported yet."""
        raise NotYetSupported("ListGenerations is not supported yet")

    async def Score(self, request: generation_pb2.ScoreRequest, context: rpc.Context) -> generation_pb2.ScoreResponse:
        """Not supported yet."""
        raise NotYetSupported("Score is not supported yet")

    def _refuse_when_draining(self) -> None:
        if self._readers.face.draining:
            raise Draining("this tokenizer is about to leave; ask another one")


class SessionService(SessionServiceServicer):
    """Looks at sessions."""

    def __init__(self, orchestrators: Orchestrators) -> None:
        self._orchestrators = orchestrators

    async def GetSession(
        self, request: session_pb2.GetSessionRequest, context: rpc.Context
    ) -> session_pb2.GetSessionResponse:
        """Describes one session."""
        validation.check_session_id(request.session_id)
        ask = orchestrator_pb2.GetSessionRequest(tenant=DEFAULT_TENANT, session_id=request.session_id)
        answer = await self._orchestrators.call(lambda stub: stub.GetSession, ask, key=request.session_id)
        return session_pb2.GetSessionResponse(session=answer.session)

    async def ListSessions(
        self, request: session_pb2.ListSessionsRequest, context: rpc.Context
    ) -> session_pb2.ListSessionsResponse:
        """Lists sessions, the most recently opened first."""
        page_size = validation.check_page_size(request.page_size)
        ask = orchestrator_pb2.ListSessionsRequest(
            tenant=DEFAULT_TENANT, page_size=page_size, page_token=request.page_token
        )
        answer = await self._orchestrators.call(lambda stub: stub.ListSessions, ask, key="")
        return session_pb2.ListSessionsResponse(sessions=answer.sessions, next_page_token=answer.next_page_token)

    async def ForkSession(
        self, request: session_pb2.ForkSessionRequest, context: rpc.Context
    ) -> session_pb2.ForkSessionResponse:
        """Not supported yet."""
        raise NotYetSupported("ForkSession is not supported yet")

    async def UpdateSession(
        self, request: session_pb2.UpdateSessionRequest, context: rpc.Context
    ) -> session_pb2.UpdateSessionResponse:
        """Not supported yet."""
        raise NotYetSupported("UpdateSession is not supported yet")

    async def DeleteSession(
        self, request: session_pb2.DeleteSessionRequest, context: rpc.Context
    ) -> session_pb2.DeleteSessionResponse:
        """Not supported yet."""
        raise NotYetSupported("DeleteSession is not supported yet")


class TokenizerService(TokenizerServiceServicer):
    """The text side of the model."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    async def ApplyChatTemplate(
        self, request: text_pb2.ApplyChatTemplateRequest, context: rpc.Context
    ) -> text_pb2.ApplyChatTemplateResponse:
        """Renders a conversation with the model's own template."""
        codec = self._codec
        validation.check_model(request.model, codec.facts)

        def apply() -> text_pb2.ApplyChatTemplateResponse:
            found = validation.Violations()
            validation.check_chat(found, "chat", request.chat)
            found.raise_if_any()
            pieces = render(codec, conversation_of(request.chat), "chat")
            response = text_pb2.ApplyChatTemplateResponse(prompt=text_of(pieces))
            response.token_ids.ids.extend(codec.encode_marked(codec.mark(pieces)))
            return response

        return await in_thread_if_long(request.ByteSize(), apply)

    async def Tokenize(self, request: text_pb2.TokenizeRequest, context: rpc.Context) -> text_pb2.TokenizeResponse:
        """Encodes text."""
        codec = self._codec
        validation.check_model(request.model, codec.facts)

        def tokenize() -> text_pb2.TokenizeResponse:
            response = text_pb2.TokenizeResponse()
            for token_id in codec.encode(
                request.text, parse_special=request.parse_special, add_special=request.add_special
            ):
                piece, special = codec.piece(token_id)
                response.tokens.add(token_id=token_id, piece=piece, special=special)
            return response

        return await in_thread_if_long(request.ByteSize(), tokenize)

    async def Detokenize(
        self, request: text_pb2.DetokenizeRequest, context: rpc.Context
    ) -> text_pb2.DetokenizeResponse:
        """Decodes ids."""
        codec = self._codec
        validation.check_model(request.model, codec.facts)
        found = validation.Violations()
        validation.check_ids(found, "token_ids.ids", request.token_ids.ids, codec.facts)
        found.raise_if_any()
        decode = codec.vocabulary.decode_with_special if request.show_special else codec.vocabulary.decode
        text = await in_thread_if_long(request.ByteSize(), decode, request.token_ids.ids)
        return text_pb2.DetokenizeResponse(text=text)


class ModelService(ModelServiceServicer):
    """Describes the model."""

    def __init__(self, codec: Codec, orchestrators: Orchestrators) -> None:
        self._codec = codec
        self._orchestrators = orchestrators
        self._identity = orchestrator_pb2.IdentifyResponse()
        self._asked_at = -MODEL_CACHE_SECONDS
        self._asking = asyncio.Lock()

    async def ListModels(
        self, request: model_pb2.ListModelsRequest, context: rpc.Context
    ) -> model_pb2.ListModelsResponse:
        """Lists the models."""
        return model_pb2.ListModelsResponse(models=[await self._model()])

    async def GetModel(self, request: model_pb2.GetModelRequest, context: rpc.Context) -> model_pb2.GetModelResponse:
        """Describes one model."""
        validation.check_model(request.model, self._codec.facts)
        return model_pb2.GetModelResponse(model=await self._model())

    async def _model(self) -> model_pb2.Model:
        facts, vocabulary, identity = self._codec.facts, self._codec.vocabulary, await self._identify()
        model = model_pb2.Model(
            model=facts.name,
            vocabulary_size=facts.vocabulary_size,
            special_tokens=[
                model_pb2.SpecialToken(token_id=token_id, content=content)
                for token_id, content in sorted(vocabulary.special.items())
            ],
            eos_token_ids=facts.eos_token_ids,
            limits=model_pb2.ModelLimits(
                context_length=min(facts.context_length, identity.context_length or facts.context_length),
                max_choices=validation.MAX_CHOICES,
                max_stop_strings=validation.MAX_STOP_STRINGS,
                max_stop_string_bytes=validation.MAX_STOP_STRING_BYTES,
                max_logit_bias=validation.MAX_LOGIT_BIAS,
                max_top_logprobs=validation.MAX_TOP_LOGPROBS,
            ),
            default_sampling=default_sampling(facts),
            has_chat_template=self._codec.template is not None,
        )
        if identity.HasField("fingerprint"):
            model.fingerprint.CopyFrom(identity.fingerprint)
        return model

    async def _identify(self) -> orchestrator_pb2.IdentifyResponse:
        """What an orchestrator says of the shards, asked at most once per second."""
        async with self._asking:
            if time.monotonic() - self._asked_at >= MODEL_CACHE_SECONDS:
                ask = orchestrator_pb2.IdentifyRequest()
                answer = await self._orchestrators.ask_any(lambda stub: stub.Identify, ask, within=MODEL_PATIENCE)
                self._identity = answer or orchestrator_pb2.IdentifyResponse()
                theirs, ours = self._identity.fingerprint.tokenizer, self._codec.facts.tokenizer_hash
                if theirs and theirs != ours:
                    log.error("the shards serve a model with another tokenizer (%s) than this one (%s)", theirs, ours)
                self._asked_at = time.monotonic()
            return self._identity


def _end_later(context: rpc.Context) -> Callable[[FermataError], None]:
    """Ends a call from outside its handler, which waits in a write that does not return."""
    tasks: set[asyncio.Task[None]] = set()

    async def end(error: FermataError) -> None:
        await rpc.abort(context, error)

    def on_slow(error: FermataError) -> None:
        task = asyncio.create_task(end(error), name="end of a slow reader")
        tasks.add(task)  # the loop itself keeps tasks by weak references only
        task.add_done_callback(_swallow)

    def _swallow(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if not task.cancelled():
            task.exception()  # always AbortError: that is how `abort` ends

    return on_slow
