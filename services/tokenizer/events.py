"""Messages of the orchestrator as events of the public contract. Shapes only; decides nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from fermata.v1 import generation_pb2, sampling_pb2
from services.common import failpoints
from services.common.timings import Parts
from services.common.types import unpack_ids
from services.common.vocabulary import IncrementalText, Vocabulary, pending_bytes
from services.orchestrator.v1 import orchestrator_pb2
from services.tokenizer.reading import ChoiceReading, Delta, TopEntries
from services.tokenizer.timing_rows import Occasion


class EventResponse(Protocol):
    """A message of a public stream: it wraps an event."""

    @property
    def event(self) -> generation_pb2.GenerationEvent:
        """The event."""
        ...


ResponseType = TypeVar("ResponseType", bound=EventResponse)


def write_started(
    started: generation_pb2.Started,
    opened: orchestrator_pb2.Opened,
    *,
    eos_token_ids: Sequence[int],
    endpoints: Sequence[str],
) -> None:
    """What a generation was opened as."""
    spec = opened.spec
    started.session_id = opened.session_id
    started.generation_id = opened.generation_id
    started.seed = spec.sampling.seed
    started.sampling.CopyFrom(spec.sampling)
    started.stop.CopyFrom(public_stop(spec.stop, eos_token_ids))
    started.n = spec.n
    if opened.HasField("fingerprint"):
        started.fingerprint.CopyFrom(opened.fingerprint)
    started.prompt_tokens = opened.prompt_tokens
    if opened.HasField("cached_tokens"):
        started.cached_tokens = opened.cached_tokens
    started.endpoints.extend(endpoints)


def public_stop(rules: orchestrator_pb2.StopRules, eos_token_ids: Sequence[int]) -> sampling_pb2.StoppingParams:
    """The stopping rules as a request would write them: the model's own end tokens are not named."""
    stop = sampling_pb2.StoppingParams(
        min_tokens=rules.min_tokens,
        strings=rules.strings,
        token_ids=[token_id for token_id in rules.token_ids if rules.ignore_eos or token_id not in eos_token_ids],
        ignore_eos=rules.ignore_eos,
        include_stop_string=rules.include_stop_string,
    )
    if rules.max_tokens:
        stop.max_tokens = rules.max_tokens
    return stop


class TokensEvent(Generic[ResponseType]):
    """The tokens event of one choice on one stream, filled anew for each write: building three nested messages per
    token costs more than all else that is done for it here.

    Attributes:
        choice: whose tokens.
        response: the message; it must be written before it is filled again.
        delta: what it was filled with last.
        occasions: where it is taken down that it left.
        began_ns, filled_ns: when that began and was done, on this process's monotonic clock.
    """

    delta: Delta
    occasions: list[Occasion]
    began_ns: int
    filled_ns: int

    def __init__(self, kind: type[ResponseType], choice: int) -> None:
        self.choice = choice
        self.response = kind()
        self._tokens = self.response.event.tokens
        self._tokens.choice = choice

    def fill(self, reading: ChoiceReading, vocabulary: Vocabulary) -> ResponseType:
        """Writes what is new in the choice; returns `response`."""
        self.began_ns = time.monotonic_ns()
        failpoints.hit("tokenizer.detokenize")
        self.delta = delta = reading.take(vocabulary)
        tokens = self._tokens
        tokens.first_offset = delta.first_offset
        tokens.token_ids[:] = delta.token_ids
        tokens.text = delta.text
        tokens.durable_count = reading.durable_count
        tokens.running_hash = reading.running_hash
        if delta.logprobs:
            tokens.logprobs[:] = delta.logprobs
            del tokens.top_logprobs[:]
            tokens.top_logprobs.extend(map(top_logprobs, delta.top_logprobs))
        self.filled_ns = time.monotonic_ns()
        return self.response

    def time(self, told: Iterable[Parts], departed_ns: int) -> None:
        """Writes where the time of each token went, just before the event leaves."""
        timings = self._tokens.timings
        del timings[:]
        for parts in told:
            message = timings.add(departed_ns=departed_ns)
            for name, value in parts._asdict().items():
                setattr(message, f"{name}_ns", value)


def top_logprobs(entries: TopEntries) -> generation_pb2.TopLogprobs:
    """The most probable ids at one offset."""
    return generation_pb2.TopLogprobs(token_ids=entries.token_ids, logprobs=entries.logprobs)


def write_finished(finished: generation_pb2.Finished, terminal: orchestrator_pb2.Terminal, text: str = "") -> None:
    """How a choice ended."""
    finished.choice = terminal.choice
    finished.finish_reason = terminal.finish_reason
    matched = terminal.WhichOneof("matched")
    if matched == "stop_token_id":
        finished.stop_token_id = terminal.stop_token_id
    elif matched == "stop_string":
        finished.stop_string = terminal.stop_string
    finished.text = text
    finished.count = terminal.count
    finished.running_hash = terminal.running_hash
    finished.usage.prompt_tokens = terminal.prompt_tokens
    finished.usage.output_tokens = terminal.count
    finished.usage.cached_tokens = terminal.cached_tokens
    if terminal.HasField("error"):
        finished.error.CopyFrom(terminal.error)


def stored_generation(
    stored: orchestrator_pb2.GetGenerationResponse,
    vocabulary: Vocabulary,
    *,
    eos_token_ids: Sequence[int],
    endpoints: Sequence[str],
) -> generation_pb2.GetGenerationResponse:
    """A generation as far as its log has it."""
    response = generation_pb2.GetGenerationResponse(state=stored.state)
    write_started(response.started, stored.opened, eos_token_ids=eos_token_ids, endpoints=endpoints)
    response.create_time.FromMilliseconds(stored.create_time_ms)
    terminals = {terminal.choice: terminal for terminal in stored.terminals}
    stops = [stop.encode() for stop in stored.opened.spec.stop.strings]
    for index, packed in enumerate(stored.output_token_ids):
        token_ids = unpack_ids(packed)
        choice = response.choices.add(choice=index, token_ids=token_ids)
        terminal = terminals.get(index)
        if terminal is not None:
            write_finished(choice.finished, terminal)
        said = vocabulary.bytes_of(token_ids)
        choice.text = shown_text(said, stops) if terminal is None else ended_text(said, terminal.cut_bytes)
    return response


def ended_text(said: bytes, cut_bytes: int) -> str:
    """The whole text of a choice that has ended."""
    return said[: len(said) - cut_bytes].decode(errors="replace")


def shown_text(said: bytes, stops: Sequence[bytes]) -> str:
    """The text of a choice that goes on: nothing that may still become a stop string, no incomplete character (R2)."""
    held = max((_overlap(said, stop) for stop in stops), default=0)
    hidden = len(pending_bytes(said, held))
    return IncrementalText().extend(said, hidden)


def _overlap(said: bytes, stop: bytes) -> int:
    """Length of the longest end of `said` that is a beginning of `stop`, less than the whole."""
    longest = min(len(stop) - 1, len(said))
    return next((length for length in range(longest, 0, -1) if said.endswith(stop[:length])), 0)
