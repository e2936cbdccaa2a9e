"""What the sync and the async stream have in common: everything but waiting.

Knows the messages and the decisions of `resume.py`; opens no call and never blocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

from fermata.errors import FermataError, Internal, NeedFrom
from fermata.events import Event, FinishReason, Generation, Heartbeat, Started, Tokens, from_message
from fermata.requests import generation_name
from fermata.resume import Endpoint, Reading, Recovery, Remedy, candidates
from fermata.timings import LastWay
from fermata.v1 import common_pb2, generation_pb2

SILENT = "no message for 3 s"
EARLY_END = "the stream ended before the generation did"
CANCEL_TIMEOUT = 2.0
"""Seconds that closing a stream waits for `Cancel`. When it fails the server parks the generation (R6)."""

LAST_WORDS_TIMEOUT = 0.5
"""Seconds that the status of a call is waited for after the last event."""


class StreamState:
    """One generation as it is read: what has come, what to ask for next, what to do when it breaks."""

    def __init__(
        self,
        request: generation_pb2.GenerationRequest | None,
        *,
        name: generation_pb2.GenerationName | None = None,
        cursors: Mapping[int, int] | None = None,
        token_ids: Mapping[int, Iterable[int]] | None = None,
        give_up_after: float,
    ) -> None:
        """Begins to read a new generation (with `request`) or one that exists (with `name`)."""
        self._request = request
        if request is not None:
            name = generation_name("", request.request_id, request.session_id)
        self._name = name or generation_pb2.GenerationName()
        self._reading = Reading(
            self._name.generation_id,
            final_only=request.output.final_only if request is not None else None,
            cursors=cursors,
            token_ids=token_ids,
        )
        self._recovery = Recovery(give_up_after)
        self._attached = False  # whether this call has spoken of the generation
        self._draining = False  # whether the other end has said that it leaves
        self._delay = 0.0  # seconds to wait before the next call
        self._failed_address = ""  # of the link that was given up last
        self._over = False
        self._last_way = LastWay()

    @property
    def generation_id(self) -> str:
        """The generation; empty before the first event."""
        return self._reading.generation_id

    @property
    def session_id(self) -> str:
        """Its session; empty before the first event."""
        return self._reading.session_id

    @property
    def started(self) -> Started | None:
        """What was used; None before the first event."""
        return self._reading.started

    @property
    def text(self) -> str:
        """Text of choice 0 so far."""
        return self._reading.choice(0).text

    @property
    def texts(self) -> list[str]:
        """Text of every choice so far."""
        return [self._reading.choice(index).text for index in range(self._reading.n)]

    @property
    def token_ids(self) -> list[int]:
        """Ids of choice 0 so far, from where the reading began."""
        return self._reading.choice(0).token_ids.tolist()

    @property
    def cursors(self) -> dict[int, int]:
        """Number of output tokens that were seen, per choice; `resume` takes them."""
        return {cursor.choice: cursor.count for cursor in self._reading.cursors()}

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return self._reading.complete

    def result(self) -> Generation:
        """What was read so far, as a whole.

        Raises:
            RuntimeError: nothing has come yet.
        """
        return self._reading.result()

    def whole_result(self) -> Generation:
        """The result of a generation that was read to its end.

        Raises:
            FermataError: all of its choices failed; the first one's error.
        """
        result = self._reading.result()
        errors = [choice.error for choice in result.choices if choice.finish_reason is FinishReason.ERROR]
        if len(errors) == len(result.choices):
            error = errors[0] or Internal("the generation failed")
            error.generation_id = result.generation_id
            raise error
        return result

    @property
    def _exists(self) -> bool:
        """Whether to resume: the generation is known to exist."""
        return self._request is None or bool(self._reading.generation_id)

    @property
    def _cancels(self) -> bool:
        """Whether closing ends the generation: a detached one is only left."""
        return self._request is None or not self._request.detach

    def _current_name(self) -> generation_pb2.GenerationName:
        return generation_name(self.generation_id) if self.generation_id else self._name

    def _generate_message(self) -> generation_pb2.StreamGenerateRequest:
        return generation_pb2.StreamGenerateRequest(generation=self._request)

    def _resume_message(self) -> generation_pb2.ResumeRequest:
        return generation_pb2.ResumeRequest(
            generation=self._current_name(),
            cursors=[
                common_pb2.Cursor(choice=cursor.choice, count=cursor.count, running_hash=cursor.running_hash)
                for cursor in self._reading.cursors()
            ],
            tails=[
                common_pb2.Tail(choice=tail.choice, first_offset=tail.first_offset, token_ids=tail.token_ids)
                for tail in self._reading.tails()
            ],
        )

    def _attach(self) -> None:
        """A new call begins."""
        self._attached = self._draining = False
        self._delay = 0.0
        self._last_way.begin()

    def _receive(self, message: generation_pb2.GenerationEvent) -> Event | None:
        """Takes what came; returns it when the reader shall see it.

        Raises:
            FermataError: it does not fit what came before.
        """
        event = from_message(message)
        if type(event) is Tokens and message.tokens.timings:
            timings = self._last_way.timings(message.tokens, time.monotonic_ns())
            event = replace(event, timings=timings)
        seen = self._reading.take(event)
        if seen is not None:
            self._attached = True
            self._recovery.progress()
        elif type(event) is Started:
            self._attached = True
        elif type(event) is Heartbeat:
            self._draining = event.draining
            if self._attached:
                self._recovery.progress()
        return seen

    def _failed(self, error: FermataError, now: float) -> Remedy:
        """What to do about a failure; raises the error when nothing helps."""
        try:
            if isinstance(error, NeedFrom):
                self._reading.need_from(error)
            remedy = self._recovery.remedy(error, started=self._exists, now=now)
        except FermataError as final:
            self._over = True
            final.generation_id = self.generation_id
            raise
        self._delay = remedy.delay
        return remedy

    def _places(self, home: str, known: tuple[str, ...]) -> list[Endpoint]:
        """Where to go on, in the order of dialling."""
        return candidates(home, self._reading.endpoints or known, self._failed_address)
