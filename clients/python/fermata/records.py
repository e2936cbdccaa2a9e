"""What the unary calls return: stored generations, sessions, models, tokens. Frozen values made from the messages.

Knows the messages and nothing of calls.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from google.protobuf import timestamp_pb2

from fermata.events import (
    Choice,
    Fingerprint,
    Finished,
    FinishReason,
    Started,
    choice_from,
    fingerprint_from,
    finished_from,
    started_from,
)
from fermata.v1 import generation_pb2, model_pb2, sampling_pb2, session_pb2, text_pb2


class GenerationState(enum.IntEnum):
    """Whether a generation goes on. The numbers are those of `fermata.v1.GenerationState`."""

    UNSPECIFIED = 0
    RUNNING = 1
    PARKED = 2
    FINISHED = 3

    @classmethod
    def _missing_(cls, value: object) -> GenerationState:
        return cls.UNSPECIFIED


class SessionState(enum.IntEnum):
    """Whether a session is busy. The numbers are those of `fermata.v1.SessionState`."""

    UNSPECIFIED = 0
    IDLE = 1
    RUNNING = 2
    PARKED = 3

    @classmethod
    def _missing_(cls, value: object) -> SessionState:
        return cls.UNSPECIFIED


@dataclass(frozen=True, slots=True)
class StoredGeneration:
    """What the session store knows of a generation.

    Attributes:
        started: what was used: ids, seed, parameters.
        state: whether it goes on.
        choices: the outputs as far as the log has them.
        create_time: when it was opened, UTC.
    """

    started: Started
    state: GenerationState
    choices: tuple[Choice, ...]
    create_time: datetime | None


@dataclass(frozen=True, slots=True)
class SessionGeneration:
    """One generation in the tree of a session.

    Attributes:
        generation_id: its id.
        parent_generation_id: the generation it went on from; empty at the root.
        parent_choice: the parent's choice.
        parent_count: how many output tokens of that choice come before this generation.
        prompt_tokens: prompt tokens that this generation added.
        output_tokens: output tokens in the log, per choice.
        finish_reasons: how each choice ended; UNSPECIFIED while it has not.
        create_time: when it was opened, UTC.
    """

    generation_id: str
    parent_generation_id: str
    parent_choice: int
    parent_count: int
    prompt_tokens: int
    output_tokens: tuple[int, ...]
    finish_reasons: tuple[FinishReason, ...]
    create_time: datetime | None


@dataclass(frozen=True, slots=True)
class Session:
    """A session: a tree of generations.

    Attributes:
        session_id: its id.
        state: whether it is busy.
        generations: its generations in the order of their opening; empty in lists.
        generation_count: how many it has.
        labels: of the request that opened it.
        create_time: when it was opened, UTC.
        expire_time: when it will be forgotten unless it is used again, UTC.
        message: the message it was made from.
    """

    session_id: str
    state: SessionState
    generations: tuple[SessionGeneration, ...]
    generation_count: int
    labels: Mapping[str, str]
    create_time: datetime | None
    expire_time: datetime | None
    message: session_pb2.Session = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """One token of an encoded text: id, bytes (a control token has its name), whether it is a control token."""

    token_id: int
    piece: bytes
    special: bool


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A conversation as the model is given it: the text with control tokens by their names, and the ids."""

    prompt: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served.

    Attributes:
        name: its name.
        vocabulary_size: number of ids.
        context_length: most tokens of a sequence, prompt and output together.
        special_tokens: control tokens by id.
        eos_token_ids: ids that end a generation.
        default_sampling: what is used where a request sets nothing.
        fingerprint: of its replicas; None while none is known.
        has_chat_template: whether it takes messages.
        message: the message it was made from, with all limits.
    """

    name: str
    vocabulary_size: int
    context_length: int
    special_tokens: Mapping[int, str]
    eos_token_ids: tuple[int, ...]
    default_sampling: sampling_pb2.SamplingParams
    fingerprint: Fingerprint | None
    has_chat_template: bool
    message: model_pb2.Model = field(repr=False, compare=False)


def stored_generation_from(message: generation_pb2.GetGenerationResponse) -> StoredGeneration:
    """The value of a stored generation."""
    return StoredGeneration(
        started=started_from(generation_pb2.GenerationEvent(started=message.started)),
        state=GenerationState(message.state),
        choices=tuple(choice_from(choice) for choice in message.choices),
        create_time=_time(message, "create_time"),
    )


def finished_list_from(message: generation_pb2.CancelResponse) -> tuple[Finished, ...]:
    """How each choice of a cancelled generation ended."""
    return tuple(finished_from(generation_pb2.GenerationEvent(finished=item)) for item in message.finished)


def session_from(message: session_pb2.Session) -> Session:
    """The value of a session."""
    return Session(
        session_id=message.session_id,
        state=SessionState(message.state),
        generations=tuple(_session_generation_from(generation) for generation in message.generations),
        generation_count=message.generation_count,
        labels=dict(message.labels),
        create_time=_time(message, "create_time"),
        expire_time=_time(message, "expire_time"),
        message=message,
    )


def _session_generation_from(message: session_pb2.SessionGeneration) -> SessionGeneration:
    return SessionGeneration(
        generation_id=message.generation_id,
        parent_generation_id=message.parent_generation_id,
        parent_choice=message.parent_choice,
        parent_count=message.parent_count,
        prompt_tokens=message.prompt_tokens,
        output_tokens=tuple(message.output_tokens),
        finish_reasons=tuple(FinishReason(reason) for reason in message.finish_reasons),
        create_time=_time(message, "create_time"),
    )


def pieces_from(message: text_pb2.TokenizeResponse) -> list[TokenPiece]:
    """The tokens of an encoded text."""
    return [TokenPiece(token.token_id, token.piece, token.special) for token in message.tokens]


def model_from(message: model_pb2.Model) -> Model:
    """The value of a model."""
    return Model(
        name=message.model,
        vocabulary_size=message.vocabulary_size,
        context_length=message.limits.context_length,
        special_tokens={token.token_id: token.content for token in message.special_tokens},
        eos_token_ids=tuple(message.eos_token_ids),
        default_sampling=message.default_sampling,
        fingerprint=fingerprint_from(message.fingerprint) if message.HasField("fingerprint") else None,
        has_chat_template=message.has_chat_template,
        message=message,
    )


def _time(
    message: generation_pb2.GetGenerationResponse | session_pb2.Session | session_pb2.SessionGeneration,
    name: str,
) -> datetime | None:
    if not message.HasField(name):  # type: ignore[arg-type]
        return None
    stamp: timestamp_pb2.Timestamp = getattr(message, name)
    return stamp.ToDatetime(tzinfo=UTC)
