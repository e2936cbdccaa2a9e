"""A tokenizer by script: a real gRPC server on a free port that says what a test wants.

One `Log` is what really was generated; every call of `StreamGenerate` and `Resume` plays the next act of the script
over it, from the caller's cursors on, and the whole log when the script is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Self, TypeAlias

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fermata.running_hash import EMPTY_HASH, extend_hash
from fermata.v1 import common_pb2, generation_pb2, model_pb2, session_pb2, text_pb2
from fermata.v1.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from fermata.v1.model_pb2_grpc import ModelServiceServicer, add_ModelServiceServicer_to_server
from fermata.v1.session_pb2_grpc import SessionServiceServicer, add_SessionServiceServicer_to_server
from fermata.v1.text_pb2_grpc import TokenizerServiceServicer, add_TokenizerServiceServicer_to_server
from services.common import rpc
from services.common.errors import GenerationNotFound

SESSION_ID = "abcdefghijklmnopqrstuvwxyz"
GENERATION_ID = f"{SESSION_ID}.0123456789abcdef"

Act: TypeAlias = Callable[["Feed"], AsyncIterator[generation_pb2.GenerationEvent]]
"""What the server does with one stream."""


class Status(Exception):
    """Ends a call with a bare status, as something on the way would."""

    def __init__(self, code: grpc.StatusCode, details: str = "") -> None:
        super().__init__(details)
        self.code = code


@dataclass
class Log:
    """What was generated: tokens with their texts, per choice."""

    choices: list[list[tuple[int, str]]]
    rest: str = ""
    finish_reason: int = common_pb2.FINISH_REASON_MAX_TOKENS
    fingerprint: str = "weights"

    def __post_init__(self) -> None:
        self._hashes = [
            list(accumulate(self.token_ids(index), extend_hash, initial=EMPTY_HASH))
            for index in range(len(self.choices))
        ]

    @classmethod
    def of(cls, *texts: str, **values: Any) -> Log:
        """A log whose tokens are the words of the texts."""
        words = [[word + " " for word in text.split()] for text in texts]
        return cls([[(zlib.crc32(word.encode()) % 50_000, word) for word in choice] for choice in words], **values)

    @property
    def texts(self) -> list[str]:
        """The whole text of each choice."""
        return ["".join(text for _, text in choice) + self.rest for choice in self.choices]

    def token_ids(self, choice: int = 0) -> list[int]:
        """The ids of a choice."""
        return [token_id for token_id, _ in self.choices[choice]]

    def hash(self, choice: int, count: int) -> bytes:
        """Running hash over the first `count` tokens."""
        return self._hashes[choice][count]


@dataclass
class Feed:
    """One call's view of the log: where the reader is, and the events that follow."""

    server: FakeServer
    log: Log
    counts: list[int]
    chunk: int = 1

    def started(self, **values: Any) -> generation_pb2.GenerationEvent:
        """The first event of a call."""
        started = generation_pb2.Started(
            session_id=SESSION_ID,
            generation_id=GENERATION_ID,
            seed=7,
            n=len(self.log.choices),
            fingerprint=common_pb2.Fingerprint(model="fake", weights=self.log.fingerprint),
            prompt_tokens=3,
            endpoints=self.server.endpoints,
            **values,
        )
        return generation_pb2.GenerationEvent(started=started)

    def heartbeat(self, *, draining: bool = False) -> generation_pb2.GenerationEvent:
        """A sign of life."""
        heartbeat = generation_pb2.Heartbeat(endpoints=self.server.endpoints, draining=draining)
        return generation_pb2.GenerationEvent(heartbeat=heartbeat)

    def tokens(self, limit: int | None = None) -> list[generation_pb2.GenerationEvent]:
        """The next `limit` messages of tokens, the choices in turn; all that are left by default."""
        events: list[generation_pb2.GenerationEvent] = []
        while limit is None or len(events) < limit:
            behind = [choice for choice, count in enumerate(self.counts) if count < len(self.log.choices[choice])]
            if not behind:
                break
            choice = min(behind, key=lambda index: self.counts[index])
            events.append(self._chunk(choice))
        return events

    def finished(self) -> list[generation_pb2.GenerationEvent]:
        """The ends of all choices."""
        return [
            generation_pb2.GenerationEvent(
                finished=generation_pb2.Finished(
                    choice=index,
                    finish_reason=self.log.finish_reason,  # type: ignore[arg-type]
                    text=self.log.rest,
                    count=len(choice),
                    running_hash=self.log.hash(index, len(choice)),
                    usage=generation_pb2.Usage(prompt_tokens=3, output_tokens=len(choice), cached_tokens=1),
                )
            )
            for index, choice in enumerate(self.log.choices)
        ]

    def _chunk(self, choice: int) -> generation_pb2.GenerationEvent:
        first = self.counts[choice]
        entries = self.log.choices[choice][first : first + self.chunk]
        count = self.counts[choice] = first + len(entries)
        tokens = generation_pb2.Tokens(
            choice=choice,
            first_offset=first,
            token_ids=[token_id for token_id, _ in entries],
            text="".join(text for _, text in entries),
            durable_count=count,
            running_hash=self.log.hash(choice, count),
        )
        return generation_pb2.GenerationEvent(tokens=tokens)


def whole(chunk: int = 1) -> Act:
    """Sends everything that is left."""

    async def act(feed: Feed) -> AsyncIterator[generation_pb2.GenerationEvent]:
        feed.chunk = chunk
        for event in [feed.started(), *feed.tokens(), *feed.finished()]:
            yield event

    return act


def after(messages: int, then: Exception | Callable[[Feed], Awaitable[None]]) -> Act:
    """Starts, sends some messages of tokens, then fails with an exception or does something."""

    async def act(feed: Feed) -> AsyncIterator[generation_pb2.GenerationEvent]:
        for event in [feed.started(), *feed.tokens(messages)]:
            yield event
        if isinstance(then, Exception):
            raise then
        await then(feed)

    return act


def refused(error: Exception) -> Act:
    """Fails before the first message."""

    async def act(feed: Feed) -> AsyncIterator[generation_pb2.GenerationEvent]:
        raise error
        yield feed.started()

    return act


async def silence(feed: Feed) -> None:
    """Says nothing more, as a stopped process."""
    await asyncio.sleep(3600)


async def early_end(feed: Feed) -> None:
    """Ends the call with OK in the middle of the generation."""


@dataclass
class FakeServer(GenerationServiceServicer, SessionServiceServicer, TokenizerServiceServicer, ModelServiceServicer):
    """A server and what it was asked.

    Attributes:
        log: what was generated.
        script: acts of the next streams.
        failures: errors of the next unary calls.
        endpoints: what it tells as its endpoints.
        calls: names of the calls that came, with their requests.
        open_streams: streams that run at this moment.
    """

    log: Log
    script: deque[Act] = field(default_factory=deque)
    failures: deque[Exception] = field(default_factory=deque)
    endpoints: list[str] = field(default_factory=list)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    open_streams: int = 0
    port: int = 0
    with_health: bool = True

    @property
    def address(self) -> str:
        """HOST:PORT of the server."""
        return f"127.0.0.1:{self.port}"

    def requests(self, name: str) -> list[Any]:
        """The requests of all calls of a name."""
        return [request for call, request in self.calls if call == name]

    async def __aenter__(self) -> Self:
        self._server = rpc.public_server(reuse_port=False)
        self._health = health.aio.HealthServicer()
        if self.with_health:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        add_GenerationServiceServicer_to_server(self, self._server)
        add_SessionServiceServicer_to_server(self, self._server)
        add_TokenizerServiceServicer_to_server(self, self._server)
        add_ModelServiceServicer_to_server(self, self._server)
        self.port = rpc.bind(self._server, "127.0.0.1", self.port)
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)

    async def kill(self, feed: Feed | None = None) -> None:
        """Dies at once."""
        # Not awaited: a call that kills its own server would wait for itself.
        self._killing = asyncio.ensure_future(self._server.stop(0))
        await asyncio.sleep(0.02)

    async def serve(self, serving: bool) -> None:
        """Sets what the health check says."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set("", status)

    async def StreamGenerate(
        self, request: generation_pb2.StreamGenerateRequest, context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[generation_pb2.StreamGenerateResponse]:
        async for event in self._play("StreamGenerate", request, [], context):
            yield generation_pb2.StreamGenerateResponse(event=event)

    async def Resume(
        self, request: generation_pb2.ResumeRequest, context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[generation_pb2.ResumeResponse]:
        async for event in self._play("Resume", request, request.cursors, context):
            yield generation_pb2.ResumeResponse(event=event)

    async def _play(
        self, name: str, request: Any, cursors: Sequence[common_pb2.Cursor], context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[generation_pb2.GenerationEvent]:
        self.calls.append((name, request))
        self.open_streams += 1
        counts = [0] * len(self.log.choices)
        for cursor in cursors:
            counts[cursor.choice] = cursor.count
        act = self.script.popleft() if self.script else whole()
        try:
            async with contextlib.aclosing(act(Feed(self, self.log, counts))) as events:  # type: ignore[type-var]
                async for event in events:
                    yield event
        except Status as status:
            await context.abort(status.code, str(status))
        finally:
            self.open_streams -= 1

    def _called(self, name: str, request: Any) -> None:
        self.calls.append((name, request))
        if self.failures:
            raise self.failures.popleft()

    async def Generate(self, request: Any, context: Any) -> generation_pb2.GenerateResponse:
        raise NotImplementedError

    async def Score(self, request: Any, context: Any) -> generation_pb2.ScoreResponse:
        raise NotImplementedError

    async def ListGenerations(self, request: Any, context: Any) -> generation_pb2.ListGenerationsResponse:
        raise NotImplementedError

    async def Cancel(self, request: generation_pb2.CancelRequest, context: Any) -> generation_pb2.CancelResponse:
        self._called("Cancel", request)
        finished = generation_pb2.Finished(finish_reason=common_pb2.FINISH_REASON_CANCELLED, count=2)
        return generation_pb2.CancelResponse(finished=[finished])

    async def GetGeneration(
        self, request: generation_pb2.GetGenerationRequest, context: Any
    ) -> generation_pb2.GetGenerationResponse:
        self._called("GetGeneration", request)
        if request.generation.generation_id not in ("", GENERATION_ID):
            raise GenerationNotFound("no such generation", metadata={"generation_id": "x"})
        feed = Feed(self, self.log, [0] * len(self.log.choices))
        response = generation_pb2.GetGenerationResponse(
            started=feed.started().started, state=generation_pb2.GENERATION_STATE_PARKED
        )
        for index, choice in enumerate(self.log.choices):
            response.choices.add(choice=index, token_ids=[item for item, _ in choice], text=self.log.texts[index])
        response.create_time.FromSeconds(1_700_000_000)
        return response

    async def GetSession(self, request: session_pb2.GetSessionRequest, context: Any) -> session_pb2.GetSessionResponse:
        self._called("GetSession", request)
        session = self._session(request.session_id)
        session.generations.add(
            generation_id=GENERATION_ID,
            prompt_tokens=3,
            output_tokens=[5],
            finish_reasons=[common_pb2.FINISH_REASON_MAX_TOKENS],
        )
        return session_pb2.GetSessionResponse(session=session)

    async def ListSessions(
        self, request: session_pb2.ListSessionsRequest, context: Any
    ) -> session_pb2.ListSessionsResponse:
        self._called("ListSessions", request)
        page = int(request.page_token or 0)
        names = [f"session{index}" for index in range(page * 2, page * 2 + 2)]
        next_page = str(page + 1) if page < 2 else ""
        return session_pb2.ListSessionsResponse(
            sessions=[self._session(name) for name in names], next_page_token=next_page
        )

    def _session(self, session_id: str) -> session_pb2.Session:
        session = session_pb2.Session(
            session_id=session_id,
            state=session_pb2.SESSION_STATE_IDLE,
            generation_count=1,
            labels={"team": "blue"},
        )
        session.create_time.FromSeconds(1_700_000_000)
        return session

    async def ForkSession(self, request: Any, context: Any) -> session_pb2.ForkSessionResponse:
        raise NotImplementedError

    async def UpdateSession(self, request: Any, context: Any) -> session_pb2.UpdateSessionResponse:
        raise NotImplementedError

    async def DeleteSession(self, request: Any, context: Any) -> session_pb2.DeleteSessionResponse:
        raise NotImplementedError

    async def Tokenize(self, request: text_pb2.TokenizeRequest, context: Any) -> text_pb2.TokenizeResponse:
        self._called("Tokenize", request)
        pieces = [request.text.encode()[start : start + 3] for start in range(0, len(request.text.encode()), 3)]
        tokens = [text_pb2.TokenPiece(token_id=100 + index, piece=piece) for index, piece in enumerate(pieces)]
        return text_pb2.TokenizeResponse(
            tokens=[*tokens, text_pb2.TokenPiece(token_id=2, piece=b"<end>", special=True)]
        )

    async def Detokenize(self, request: text_pb2.DetokenizeRequest, context: Any) -> text_pb2.DetokenizeResponse:
        self._called("Detokenize", request)
        return text_pb2.DetokenizeResponse(text=" ".join(map(str, request.token_ids.ids)))

    async def ApplyChatTemplate(
        self, request: text_pb2.ApplyChatTemplateRequest, context: Any
    ) -> text_pb2.ApplyChatTemplateResponse:
        self._called("ApplyChatTemplate", request)
        text = "|".join(part.text for message in request.chat.messages for part in message.content)
        return text_pb2.ApplyChatTemplateResponse(prompt=text, token_ids=common_pb2.TokenIds(ids=[1, 2, 3]))

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Any) -> model_pb2.ListModelsResponse:
        self._called("ListModels", request)
        model = model_pb2.Model(
            model="fake",
            vocabulary_size=50_000,
            special_tokens=[model_pb2.SpecialToken(token_id=2, content="<end>")],
            eos_token_ids=[2],
            limits=model_pb2.ModelLimits(context_length=1024),
            has_chat_template=True,
        )
        return model_pb2.ListModelsResponse(models=[model])

    async def GetModel(self, request: Any, context: Any) -> model_pb2.GetModelResponse:
        raise NotImplementedError
