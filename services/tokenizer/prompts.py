"""The ids that a request adds to a session: rendering, encoding, and the place where the session goes on (R17).

Reads a session's turns from an orchestrator; opens nothing. Long inputs are worked on in a thread, so that no other
stream waits for them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

from fermata.v1 import chat_pb2, generation_pb2
from services.common.errors import (
    ContextLengthExceeded,
    FieldViolation,
    InvalidRequest,
    NoChatTemplate,
    PositionMismatch,
)
from services.common.types import DEFAULT_TENANT, unpack_ids
from services.orchestrator.v1 import orchestrator_pb2
from services.tokenizer import turns as session_turns
from services.tokenizer.chat_template import Conversation, Piece
from services.tokenizer.codec import Codec
from services.tokenizer.orchestrators import Orchestrators
from services.tokenizer.requests import assistant_message, conversation_of, with_inherited
from services.tokenizer.turns import Branch, Continuation, Turn

LONG_INPUT = 4096
"""Bytes of a request from which on it is rendered and encoded in a thread."""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a new generation begins with.

    Attributes:
        token_ids: the ids that it adds.
        parent: where in the session's tree it begins; empty at the root.
        position: length of the id sequence before `token_ids`.
        messages: the chat that they came from, serialized; empty for raw prompts.
        generation_count: number of generations that the session had when it was read; None for a new one.
        render_ns, encode_ns: how long it took.
    """

    token_ids: list[int]
    parent: Branch = field(default_factory=Branch)
    position: int = 0
    messages: bytes = b""
    generation_count: int | None = None
    render_ns: int = 0
    encode_ns: int = 0


class _Past:
    """A session as it was read: its turns, and what was said in those of them that were chats."""

    def __init__(self, codec: Codec, response: orchestrator_pb2.OpenSessionResponse) -> None:
        self.generation_count = response.generation_count
        self.turns: list[Turn] = []
        self.chats: list[chat_pb2.ChatInput] = []
        self._texts: list[str] = []
        self.first_chat = 0
        for index, turn in enumerate(response.turns):
            chat = chat_pb2.ChatInput.FromString(turn.messages)
            output_ids = unpack_ids(turn.output_token_ids)
            said = codec.vocabulary.bytes_of(output_ids)
            parent = Branch(turn.parent.generation_id, turn.parent.choice, turn.parent.count)
            prompt_ids = unpack_ids(turn.prompt_token_ids)
            continues = chat.continue_final_message
            self.turns.append(Turn(turn.generation_id, parent, prompt_ids, output_ids, continues_message=continues))
            self.chats.append(chat)
            self._texts.append(said[: len(said) - turn.cut_bytes].decode(errors="replace"))
            if not turn.messages:
                self.first_chat = index + 1  # what came before a raw prompt is not part of the conversation

    def messages(self, first: int) -> list[chat_pb2.Message]:
        """What was said from turn `first` on, the model's own words included."""
        messages: list[chat_pb2.Message] = []
        for chat, text in zip(self.chats[first:], self._texts[first:], strict=True):
            messages.extend(chat.messages)
            if chat.continue_final_message and messages:
                continued = chat_pb2.Message()
                continued.CopyFrom(messages[-1])
                continued.content.add(text=text)
                messages[-1] = continued
            else:
                messages.append(assistant_message(text))
        return messages


class Prompter:
    """Makes prompts for one model."""

    def __init__(self, codec: Codec, orchestrators: Orchestrators) -> None:
        self._codec = codec
        self._orchestrators = orchestrators

    async def prompt_of(self, request: generation_pb2.GenerationRequest) -> Prompt:
        """Makes the prompt of a checked request.

        Raises:
            InvalidRequest: the input has no tokens.
            NoChatTemplate, TemplateFailed: the conversation cannot be rendered.
            PositionMismatch: the session is not where the request expects it.
            ContextLengthExceeded: no room is left for output.
            SessionNotFound, GenerationNotFound, NoOrchestrator: the session cannot be read.
        """
        past = await self._past_of(request) if request.session_id else None
        length = len(session_turns.sequence_of(past.turns)) if past else 0
        if request.HasField("expected_position") and request.expected_position != length:
            raise PositionMismatch(
                f"the session is at position {length}, not {request.expected_position}",
                metadata={"position": str(length)},
            )
        began = time.monotonic_ns()
        prompt = await in_thread_if_long(request.ByteSize() + length, self._build, request, past)
        prompt = replace(prompt, encode_ns=time.monotonic_ns() - began - prompt.render_ns)
        total, limit = prompt.position + len(prompt.token_ids), self._codec.facts.context_length
        if total == 0:
            violation = FieldViolation("generation.input", "must give at least one token")
            raise InvalidRequest("the input has no tokens", violations=[violation])
        if total >= limit:
            raise ContextLengthExceeded(
                f"{total} tokens leave no room in a context of {limit}",
                metadata={"prompt_tokens": str(total), "context_length": str(limit)},
            )
        return prompt

    async def _past_of(self, request: generation_pb2.GenerationRequest) -> _Past:
        ask = orchestrator_pb2.OpenSessionRequest(
            tenant=DEFAULT_TENANT,
            session_id=request.session_id,
            generation_id=request.continue_from.generation_id,
            choice=request.continue_from.choice,
        )
        response = await self._orchestrators.call(lambda stub: stub.OpenSession, ask, key=request.session_id)
        return _Past(self._codec, response)

    def _build(self, request: generation_pb2.GenerationRequest, past: _Past | None) -> Prompt:
        """Everything that needs no other process."""
        if request.WhichOneof("input") == "chat":
            return self._chat_prompt(request, past)
        if request.WhichOneof("input") == "token_ids":
            token_ids = list(request.token_ids.ids)
        else:
            new = past is None
            token_ids = self._codec.encode(request.prompt, add_special=new, continues=not new)
        if past is None:
            return Prompt(token_ids)
        continuation = session_turns.append_to(past.turns, request.continue_from.choice, token_ids)
        return _continued(continuation, b"", past)

    def _chat_prompt(self, request: generation_pb2.GenerationRequest, past: _Past | None) -> Prompt:
        codec, chat, began = self._codec, request.chat, time.monotonic_ns()
        if past is None:
            pieces = render(codec, conversation_of(chat), "generation.chat")
            render_ns = time.monotonic_ns() - began
            token_ids = codec.encode_marked(codec.mark(pieces))
            return Prompt(token_ids, messages=chat.SerializeToString(), render_ns=render_ns)
        first = past.first_chat
        complete = with_inherited(chat, past.chats[first:])
        conversation = conversation_of(complete, past.messages(first))
        pieces = render(codec, conversation, "generation.chat")
        render_ns = time.monotonic_ns() - began
        continuation = session_turns.continue_session(
            past.turns,
            request.continue_from.choice,
            codec.mark(_without_beginning(pieces, codec) if first else pieces),
            first=first,
            text_of=codec.marked_bytes,
            encode=lambda text, continues: codec.encode_marked(text, continues=continues),
        )
        if continuation.kept < len(past.turns):
            # Their messages would no longer be on the way from the root: the new turn says them again.
            retold = chat_pb2.ChatInput()
            retold.CopyFrom(complete)
            del retold.messages[:]
            retold.messages.extend([*past.messages(continuation.kept), *chat.messages])
            chat = retold
        return replace(_continued(continuation, chat.SerializeToString(), past), render_ns=render_ns)


def render(codec: Codec, conversation: Conversation, field_name: str) -> list[Piece]:
    """Renders a conversation with the model's template.

    Raises:
        NoChatTemplate: the model has none.
        TemplateFailed: it refuses.
        InvalidRequest: nothing is there to be continued.
    """
    if codec.template is None:
        name = codec.facts.name
        raise NoChatTemplate(f"{name} has no chat template; give a prompt or token_ids", metadata={"model": name})
    if not conversation.messages:
        violation = FieldViolation(f"{field_name}.messages", "at least one message is needed")
        raise InvalidRequest("the conversation is empty", violations=[violation])
    return codec.template.render(conversation, field_name=field_name)


async def in_thread_if_long(
    size: int, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> Result:
    """Calls a function of the processor alone: here when it is quick, else beside the event loop."""
    if size < LONG_INPUT:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


def _continued(continuation: Continuation, messages: bytes, past: _Past) -> Prompt:
    return Prompt(continuation.token_ids, continuation.parent, continuation.position, messages, past.generation_count)


def _without_beginning(pieces: Sequence[Piece], codec: Codec) -> Sequence[Piece]:
    """A rendering without the token that begins a text, for one that stands behind other tokens."""
    begins = bool(pieces) and pieces[0].control and pieces[0].text == codec.facts.beginning
    return pieces[1:] if begins else pieces
