"""The async client. Its calls are those of the public API, with plain Python values on both sides."""

# ruff: noqa: ASYNC109 - a timeout is also the deadline that the server is told
from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

from fermata.aio_links import Links
from fermata.aio_stream import AsyncStream
from fermata.dialing import DEFAULT_SERVER, parse_server
from fermata.errors import Unavailable
from fermata.events import Finished, Generation
from fermata.records import (
    Model,
    RenderedPrompt,
    Session,
    StoredGeneration,
    TokenPiece,
    finished_list_from,
    model_from,
    pieces_from,
    session_from,
    stored_generation_from,
)
from fermata.requests import Messages, Options, chat_input, generation_name, generation_request
from fermata.resume import GIVE_UP_AFTER, Endpoint, Recovery
from fermata.v1 import common_pb2, generation_pb2, model_pb2, session_pb2, telemetry_pb2, text_pb2


class AsyncClient:
    """Generates text on one event loop; any number of calls and streams may run at once.

    Every call may raise a `fermata.FermataError`; the tree of them is in `fermata.errors`. Calls over a broken link
    are repeated by themselves, streams are resumed.

    Args:
        server: HOST:PORT, with or without `grpc://` before it.
        give_up_after: seconds of trouble without progress after which a call or stream fails.
    """

    def __init__(self, server: str = DEFAULT_SERVER, *, give_up_after: float = GIVE_UP_AFTER) -> None:
        self._links = Links(parse_server(server), give_up_after)

    async def generate(
        self, prompt: str | None = None, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Generation:
        """Generates and returns the whole result.

        Args:
            prompt: raw text; or give `messages` or `token_ids`.
            timeout: seconds after which the waiting ends. The generation does not end by it.
            options: see `fermata.Options`.

        Raises:
            FermataError: the generation failed, in all of its choices.
        """
        async with self.stream(prompt, timeout=timeout, **options) as stream:
            async for _ in stream:
                pass
        return stream.whole_result()

    def stream(
        self, prompt: str | None = None, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncStream:
        """Generates and yields events; the request is sent at the first iteration.

        Args:
            prompt: raw text; or give `messages` or `token_ids`.
            timeout: seconds, from the first iteration, after which the reading ends. The generation does not.
            options: see `fermata.Options`.
        """
        return AsyncStream(self._links, timeout, request=generation_request(prompt, options))

    def resume(
        self,
        generation_id: str = "",
        *,
        cursors: Mapping[int, int] | None = None,
        token_ids: Mapping[int, Iterable[int]] | None = None,
        request_id: str = "",
        session_id: str = "",
        timeout: float | None = None,
    ) -> AsyncStream:
        """Reads a generation that exists, and continues it where it was left.

        Args:
            generation_id: the generation; or name it by the `request_id` (and `session_id`) of its request.
            cursors: number of output tokens already seen, per choice; none means from the start.
            token_ids: better than `cursors`: the ids already seen, per choice. With them the tokens are checked
                against the log, and what the log lost is given back to it.
            request_id: of the request that opened it.
            session_id: that this request named, if it did.
            timeout: seconds, from the first iteration, after which the reading ends.
        """
        name = generation_name(generation_id, request_id, session_id)
        return AsyncStream(self._links, timeout, request=None, name=name, cursors=cursors, token_ids=token_ids)

    async def cancel(
        self, generation_id: str = "", *, request_id: str = "", session_id: str = "", timeout: float | None = None
    ) -> tuple[Finished, ...]:
        """Ends a generation for all readers and returns how each choice ended. Idempotent."""
        request = generation_pb2.CancelRequest(generation=generation_name(generation_id, request_id, session_id))
        response = await self._links.call(lambda link: link.generations.Cancel, request, timeout)
        return finished_list_from(response)

    async def get_generation(
        self, generation_id: str = "", *, request_id: str = "", session_id: str = "", timeout: float | None = None
    ) -> StoredGeneration:
        """Describes a generation with the tokens that its log has."""
        name = generation_name(generation_id, request_id, session_id)
        request = generation_pb2.GetGenerationRequest(generation=name)
        response = await self._links.call(lambda link: link.generations.GetGeneration, request, timeout)
        return stored_generation_from(response)

    async def get_session(self, session_id: str, *, timeout: float | None = None) -> Session:
        """Describes a session with its generations."""
        request = session_pb2.GetSessionRequest(session_id=session_id)
        response = await self._links.call(lambda link: link.sessions.GetSession, request, timeout)
        return session_from(response.session)

    async def list_sessions(self, *, limit: int | None = None, timeout: float | None = None) -> list[Session]:
        """Lists sessions without their generations, the most recently opened first; at most `limit` of them."""
        sessions: list[Session] = []
        request = session_pb2.ListSessionsRequest(page_size=min(limit or 0, 1000))
        while True:
            response = await self._links.call(lambda link: link.sessions.ListSessions, request, timeout)
            sessions += [session_from(session) for session in response.sessions]
            request.page_token = response.next_page_token
            if not request.page_token or (limit is not None and len(sessions) >= limit):
                return sessions[:limit]

    async def tokenize(
        self,
        text: str,
        *,
        model: str = "",
        parse_special: bool = False,
        add_special: bool = False,
        timeout: float | None = None,
    ) -> list[TokenPiece]:
        """Encodes text and shows its pieces.

        Args:
            text: the text.
            model: name of the model; empty takes the only one.
            parse_special: encode control tokens that stand in the text as such.
            add_special: put the tokens at both ends that the tokenizer itself adds.
            timeout: seconds.
        """
        request = text_pb2.TokenizeRequest(text=text, model=model, parse_special=parse_special, add_special=add_special)
        return pieces_from(await self._links.call(lambda link: link.texts.Tokenize, request, timeout))

    async def detokenize(
        self,
        token_ids: Iterable[int],
        *,
        model: str = "",
        show_special: bool = False,
        timeout: float | None = None,
    ) -> str:
        """Decodes ids; with `show_special` control tokens by their names, else they have no text."""
        ids = common_pb2.TokenIds(ids=token_ids)
        request = text_pb2.DetokenizeRequest(token_ids=ids, model=model, show_special=show_special)
        response = await self._links.call(lambda link: link.texts.Detokenize, request, timeout)
        return response.text

    async def apply_chat_template(
        self,
        messages: Messages,
        *,
        model: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        template_arguments: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        timeout: float | None = None,
    ) -> RenderedPrompt:
        """Renders a conversation with the model's own template."""
        chat = chat_input(
            messages,
            tools=tools,
            template_arguments=template_arguments,
            continue_final_message=continue_final_message,
        )
        request = text_pb2.ApplyChatTemplateRequest(model=model, chat=chat)
        response = await self._links.call(lambda link: link.texts.ApplyChatTemplate, request, timeout)
        return RenderedPrompt(response.prompt, tuple(response.token_ids.ids))

    async def models(self, *, timeout: float | None = None) -> list[Model]:
        """Lists the models."""
        request = model_pb2.ListModelsRequest()
        response = await self._links.call(lambda link: link.models.ListModels, request, timeout)
        return [model_from(model) for model in response.models]

    async def statistics(self, *, timeout: float | None = None) -> telemetry_pb2.GetStatisticsResponse:
        """What all processes count, as it stands now; `fermata.statistics.overview` makes rates of two of them."""
        request = telemetry_pb2.GetStatisticsRequest()
        return await self._links.call(lambda link: link.telemetry.GetStatistics, request, timeout)

    async def trace(
        self, generation_id: str = "", *, request_id: str = "", session_id: str = "", timeout: float | None = None
    ) -> bytes:
        """Where the time of a generation went, as far as the server remembers it, as a document in OTLP/JSON."""
        request = telemetry_pb2.GetTraceRequest(generation=generation_name(generation_id, request_id, session_id))
        response = await self._links.call(lambda link: link.telemetry.GetTrace, request, timeout)
        return response.otlp_json

    async def wait_until_ready(self, timeout: float) -> None:
        """Waits until the server answers and says that it serves.

        Raises:
            Unavailable: it did not within `timeout` seconds.
        """
        recovery = Recovery(timeout)
        while True:
            try:
                link = await self._links.race([Endpoint(self._links.home, 0)], serving_only=True)
            except Unavailable as error:
                remedy = recovery.remedy(error, started=False, now=time.monotonic())
                await asyncio.sleep(remedy.delay)
            else:
                self._links.release(link)
                return

    async def close(self) -> None:
        """Closes the connections. Streams that are open end."""
        await self._links.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
