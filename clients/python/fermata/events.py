"""What a stream yields and what a whole generation looks like: frozen values, made from the messages of the wire.

Knows the messages and nothing of calls, resuming or terminals.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

from fermata.errors import FermataError, from_status
from fermata.timings import TokenTimings
from fermata.v1 import common_pb2, generation_pb2, sampling_pb2


class FinishReason(enum.IntEnum):
    """Why a choice ended. The numbers are those of `fermata.v1.FinishReason`."""

    UNSPECIFIED = 0
    STOP_TOKEN = 1
    STOP_STRING = 2
    MAX_TOKENS = 3
    CONTEXT_LENGTH = 4
    TIME_LIMIT = 5
    CANCELLED = 6
    ERROR = 7

    @classmethod
    def _missing_(cls, value: object) -> FinishReason:
        return cls.UNSPECIFIED  # a newer server may know more


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What two replicas must have in common to promise each other the same tokens."""

    model: str
    weights: str
    kernels: str
    tokenizer: str
    parallel_degree: int
    noise_version: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens.

    Attributes:
        prompt_tokens: length of the id sequence before the output.
        output_tokens: output tokens in the log.
        cached_tokens: prompt tokens that were found in the KV cache.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """The most probable tokens at one position, most probable first, with their raw log-probabilities."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Started:
    """The generation exists from here on, whatever fails.

    Comes first; again only when the generation went on on a replica with another fingerprint.

    Attributes:
        session_id: name it in the next request to go on.
        generation_id: `resume` and `cancel` take it.
        seed: seed of the noise, drawn when the request had none.
        sampling: the sampling program as used, nothing unset.
        stop: the stopping rules as used.
        n: number of choices.
        fingerprint: of the replica; None while none was found.
        prompt_tokens: length of the id sequence before the first output token.
        cached_tokens: how many of these were found in the KV cache; None when not known yet.
        endpoints: HOST:PORT of tokenizers that can resume this generation, the speaker first.
        message: the event as it came.
    """

    text: ClassVar[str] = ""
    """Nothing: every event has a text, and their texts concatenate to the whole."""

    session_id: str
    generation_id: str
    seed: int
    sampling: sampling_pb2.SamplingParams
    stop: sampling_pb2.StoppingParams
    n: int
    fingerprint: Fingerprint | None
    prompt_tokens: int
    cached_tokens: int | None
    endpoints: tuple[str, ...]
    message: generation_pb2.GenerationEvent = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Output tokens `first_offset` to `first_offset + len(token_ids) - 1` of one choice.

    Attributes:
        choice: index of the choice.
        first_offset: offset of the first token within the choice.
        token_ids: the ids.
        text: what they add to the text; never ends within a character.
        logprobs: raw log-probability of each token, when asked for.
        top_logprobs: most probable tokens at each offset, when asked for.
        durable_count: tokens of this choice that the session store has acknowledged.
        running_hash: 8 bytes over all tokens of the choice up to the last of these; the library has checked it.
        message: the event as it came.
        timings: where the time of each token went, when asked for.
    """

    choice: int
    first_offset: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    top_logprobs: tuple[TopLogprobs, ...]
    durable_count: int
    running_hash: bytes
    message: generation_pb2.GenerationEvent = field(repr=False, compare=False)
    timings: tuple[TokenTimings, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice has ended; nothing follows for it.

    Attributes:
        choice: index of the choice.
        finish_reason: why it ended.
        stop_token_id: the stop token that matched, if one did.
        stop_string: the stop string that matched, if one did.
        text: the rest of the text (with `final_only` all of it).
        count: number of output tokens.
        running_hash: 8 bytes over all output tokens of the choice.
        usage: token counts of this choice.
        error: what went wrong, with `FinishReason.ERROR`.
        message: the event as it came.
    """

    choice: int
    finish_reason: FinishReason
    stop_token_id: int | None
    stop_string: str | None
    text: str
    count: int
    running_hash: bytes
    usage: Usage
    error: FermataError | None
    message: generation_pb2.GenerationEvent = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The stream is alive. Consumed by the library, never yielded."""

    endpoints: tuple[str, ...]
    draining: bool


Event: TypeAlias = Started | Tokens | Finished
"""What a stream yields."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One output, whole or as far as it is known.

    Attributes:
        index: its index, from 0.
        text: its text.
        token_ids: its ids; empty after a stream with `final_only`.
        finished: how it ended; None while it has not.
        logprobs: raw log-probability of each token, when asked for.
        top_logprobs: most probable tokens at each offset, when asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finished: Finished | None = None
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended; UNSPECIFIED while it has not."""
        return self.finished.finish_reason if self.finished else FinishReason.UNSPECIFIED

    @property
    def usage(self) -> Usage:
        """Its token counts, complete when it has ended."""
        return self.finished.usage if self.finished else Usage(output_tokens=len(self.token_ids))

    @property
    def error(self) -> FermataError | None:
        """What went wrong, with `FinishReason.ERROR`."""
        return self.finished.error if self.finished else None


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole generation.

    Attributes:
        started: what was used: ids, seed, parameters.
        choices: the outputs, by index.
    """

    started: Started
    choices: tuple[Choice, ...]

    @property
    def generation_id(self) -> str:
        """Its id."""
        return self.started.generation_id

    @property
    def session_id(self) -> str:
        """Its session; name it in the next request to go on."""
        return self.started.session_id

    @property
    def seed(self) -> int:
        """Seed of the noise."""
        return self.started.seed

    @property
    def text(self) -> str:
        """Text of choice 0."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids of choice 0."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why choice 0 ended."""
        return self.choices[0].finish_reason

    @property
    def finish_reasons(self) -> tuple[FinishReason, ...]:
        """Why each choice ended."""
        return tuple(choice.finish_reason for choice in self.choices)

    @property
    def usage(self) -> Usage:
        """Token counts of all choices together; the prompt counts once."""
        first = self.choices[0].usage
        output = sum(choice.usage.output_tokens for choice in self.choices)
        return Usage(first.prompt_tokens, output, first.cached_tokens)


def from_message(message: generation_pb2.GenerationEvent) -> Event | Heartbeat | None:
    """The value of an event; None for a kind that this version does not know."""
    kind = message.WhichOneof("event")
    if kind == "tokens":
        return tokens_from(message)
    if kind == "started":
        return started_from(message)
    if kind == "finished":
        return finished_from(message)
    if kind == "heartbeat":
        return Heartbeat(tuple(message.heartbeat.endpoints), message.heartbeat.draining)
    return None


def tokens_from(message: generation_pb2.GenerationEvent) -> Tokens:
    """The value of a `tokens` event, without its timings. On the hot path: about 3 µs."""
    tokens = message.tokens
    logprobs, top = tokens.logprobs, tokens.top_logprobs
    return Tokens(
        tokens.choice,
        tokens.first_offset,
        tuple(tokens.token_ids),
        tokens.text,
        tuple(logprobs) if logprobs else (),
        _top_logprobs(top) if top else (),
        tokens.durable_count,
        tokens.running_hash,
        message,
    )


def started_from(message: generation_pb2.GenerationEvent) -> Started:
    """The value of a `started` event."""
    started = message.started
    return Started(
        session_id=started.session_id,
        generation_id=started.generation_id,
        seed=started.seed,
        sampling=started.sampling,
        stop=started.stop,
        n=started.n,
        fingerprint=fingerprint_from(started.fingerprint) if started.HasField("fingerprint") else None,
        prompt_tokens=started.prompt_tokens,
        cached_tokens=started.cached_tokens if started.HasField("cached_tokens") else None,
        endpoints=tuple(started.endpoints),
        message=message,
    )


def finished_from(message: generation_pb2.GenerationEvent) -> Finished:
    """The value of a `finished` event."""
    finished = message.finished
    return Finished(
        choice=finished.choice,
        finish_reason=FinishReason(finished.finish_reason),
        stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
        stop_string=finished.stop_string if finished.HasField("stop_string") else None,
        text=finished.text,
        count=finished.count,
        running_hash=finished.running_hash,
        usage=Usage(finished.usage.prompt_tokens, finished.usage.output_tokens, finished.usage.cached_tokens),
        error=from_status(finished.error) if finished.HasField("error") else None,
        message=message,
    )


def fingerprint_from(message: common_pb2.Fingerprint) -> Fingerprint:
    """The value of a fingerprint."""
    return Fingerprint(
        message.model,
        message.weights,
        message.kernels,
        message.tokenizer,
        message.parallel_degree,
        message.noise_version,
    )


def choice_from(message: generation_pb2.Choice) -> Choice:
    """The value of a stored choice."""
    ended = FinishReason(message.finished.finish_reason) is not FinishReason.UNSPECIFIED
    return Choice(
        index=message.choice,
        text=message.text,
        token_ids=tuple(message.token_ids),
        finished=finished_from(generation_pb2.GenerationEvent(finished=message.finished)) if ended else None,
        logprobs=tuple(message.logprobs),
        top_logprobs=_top_logprobs(message.top_logprobs),
    )


def _top_logprobs(messages: Iterable[generation_pb2.TopLogprobs]) -> tuple[TopLogprobs, ...]:
    return tuple(TopLogprobs(tuple(item.token_ids), tuple(item.logprobs)) for item in messages)
