"""How one reader is told its tokens, and where their time went (R25): figures, timings, spans.

Pairs the moments that a token brings along with those at which it was told. Knows clocks and spans, and no stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from services.common import attributes as names
from services.common.errors import FermataError
from services.common.telemetry import Telemetry
from services.common.timings import CallMoments, Parts, Told, between, first
from services.common.tracing import (
    Attribute,
    Span,
    TraceContext,
    current_call,
    is_chosen,
    new_trace,
    since_epoch,
    unpack,
)
from services.common.types import FinishReason
from services.orchestrator.v1 import orchestrator_pb2
from services.tokenizer.decode_record import MOST_TOKENS, DecodeRecord
from services.tokenizer.events import TokensEvent
from services.tokenizer.figures import Figures
from services.tokenizer.timing_rows import NotedMoments, Occasion, delivery_of

SETTLE_OCCASIONS = 256
SETTLE_NS = 2_000_000_000
"""Tokens are worked out when there are so many of a choice, or after so many nanoseconds."""


class Telling:
    """The tokens of one reader, event by event.

    Attributes:
        wrote_ns: from when to when the reader took the events before, on this process's monotonic clock.
    """

    def __init__(
        self, telemetry: Telemetry, figures: Figures, call: CallMoments | None, on_slow: Callable[[str], None]
    ) -> None:
        """Begins with the call that is served now.

        Args:
            telemetry: takes the spans.
            figures: take the counts.
            call: of the call that opened the generation; None when this one only reads it.
            on_slow: told the id of a generation whose steps the collector shall have.
        """
        self.wrote_ns = 0, 0
        self._telemetry, self._figures, self._on_slow = telemetry, figures, on_slow
        self._opens = call is not None
        self._slow_ns = int(1e9 * telemetry.settings.slow_token)
        self._slow_first_ns = int(1e9 * telemetry.settings.slow_first_token)
        self._call = call or CallMoments(time.monotonic_ns(), 0, 0, 0)
        self._served = current_call()
        self._opened: orchestrator_pb2.Opened | None = None
        self._context = new_trace(sampled=False)
        self._looks = telemetry.active
        self._timed = False
        self._last: dict[int, Told] = {}
        self._records: dict[int, DecodeRecord] = {}
        self._due_ns = self._call.arrived + SETTLE_NS
        self._count = 0
        self._first_ns = 0
        self._finish_reasons: list[str] = []
        self._cached_tokens = 0
        self._error = ""
        self._slow = False

    # --- what the reader notes ---------------------------------------------------------------------------------

    def opened(self, opened: orchestrator_pb2.Opened) -> None:
        """It is known what is read."""
        self._opened = opened
        self._timed = opened.spec.output.timings
        self._looks = self._looks or self._timed
        self._context = unpack(opened.spec.trace_context) or self._context
        if self._served is not None:
            self._served.generation_id = opened.generation_id

    def occasions(self, choice: int, first_offset: int) -> list[Occasion]:
        """Where the tokens of a choice are taken down from the one at `first_offset` on."""
        record = self._records.get(choice)
        if record is None:
            record = self._records[choice] = DecodeRecord(choice, first_offset, self._call)
        return record.waiting

    def leaves(self, event: TokensEvent[Any], departed_ns: int) -> None:
        """An event is about to be written: it has its timings now."""
        if not self._looks:
            return
        # Once per token: what can be worked out later is worked out later, for many at once.
        occasion = event.delta.moments, event.began_ns, event.filled_ns, departed_ns, *self.wrote_ns
        event.occasions.append(occasion)
        if departed_ns > self._due_ns or len(event.occasions) >= SETTLE_OCCASIONS:
            self._settle_all(departed_ns)
        if self._timed:
            event.time(self._parts(event.choice, occasion), departed_ns)

    def collected(self, choice: int, first_offset: int, moments: Sequence[NotedMoments]) -> None:
        """Tokens that only the end tells: they are where they go when they arrive."""
        occasions = self.occasions(choice, first_offset)
        for item in moments:
            received = item.moments.received
            occasions.append(((item,), received, received, received, 0, 0))

    def finished(self, terminal: orchestrator_pb2.Terminal) -> None:
        """A choice has ended."""
        reason = FinishReason(terminal.finish_reason)
        self._finish_reasons.append(reason.name.lower())
        self._cached_tokens = terminal.cached_tokens
        self._figures.finished(reason)
        if reason is FinishReason.ERROR:
            self._error = reason.name

    def failed(self, error: FermataError) -> None:
        """The call ends with an error."""
        self._error = error.reason

    def close(self) -> None:
        """The call is over."""
        for record in self._records.values():
            self._settle(record)
            self._hand_on(record)
        self._records.clear()
        now = time.monotonic_ns()
        if self._opens:
            first_seconds = (self._first_ns - self._call.arrived) / 1e9
            self._figures.request((now - self._call.arrived) / 1e9, self._count, first_seconds)
            if self._opened is not None:
                self._hand_on_request(self._opened, now)

    # --- what follows from it ----------------------------------------------------------------------------------

    def _parts(self, choice: int, occasion: Occasion) -> Iterator[Parts]:
        """The parts of tokens that leave now, for a reader who asked for them."""
        for noted in occasion[0]:
            told = Told(noted.moments, delivery_of(noted, occasion))
            last = self._last.get(choice)
            self._last[choice] = told
            yield between(last, told) if last is not None else first(told, self._call)

    def _settle_all(self, now_ns: int) -> None:
        self._due_ns = now_ns + SETTLE_NS
        for record in self._records.values():
            self._settle(record)

    def _settle(self, record: DecodeRecord) -> None:
        begins = record.first_ns is None
        parts = record.settle()
        if begins and record.first_ns is not None:
            self._slow = self._slow or int(parts[0, 0]) > self._slow_first_ns
            self._first_ns = min(self._first_ns or record.first_ns, record.first_ns)
            if self._opens:
                self._figures.first_token(Parts(*parts[0].tolist()))
            parts = parts[1:]
            self._count += 1
        self._count += len(parts)
        self._figures.tokens(parts)
        self._slow = self._slow or bool((parts[:, 0] > self._slow_ns).any())
        if record.count >= MOST_TOKENS:
            self._hand_on(record)

    def _hand_on(self, record: DecodeRecord) -> None:
        """Makes the spans of what is worked out."""
        if self._opened is None or not record.count:
            return
        generation_id = self._opened.generation_id
        served = self._served.context if self._served is not None and not self._opens else None
        decode = record.span(generation_id, self._context, served)
        self._telemetry.record(generation_id, decode)
        if self._context.sampled:
            chosen = is_chosen(self._context, self._telemetry.settings.waterfall_share)
            notable = self._slow or bool(self._error)
            if notable and not chosen:
                self._on_slow(generation_id)  # the shards know by themselves which are chosen
            if notable or chosen:
                for span in record.token_spans(decode):
                    self._telemetry.export(span)
        self._slow = False
        record.clear()

    def _hand_on_request(self, opened: orchestrator_pb2.Opened, ended_ns: int) -> None:
        """Makes the spans of the whole request: itself, and how its prompt was made."""
        call, spec = self._call, opened.spec
        operation = "chat" if call.render else "text_completion"
        parent = self._served.context.span_id if self._served is not None else b""
        attributes = _request_attributes(opened, operation)
        attributes[names.RESPONSE_FINISH_REASONS] = self._finish_reasons
        attributes[names.USAGE_OUTPUT_TOKENS] = self._count
        attributes[names.USAGE_CACHE_READ_TOKENS] = self._cached_tokens
        if self._first_ns:
            attributes[names.RESPONSE_TIME_TO_FIRST_CHUNK] = (self._first_ns - call.arrived) / 1e9
        if self._error:
            attributes[names.ERROR_TYPE] = self._error
        self._telemetry.record(
            opened.generation_id,
            Span(
                f"{operation} {spec.model}",
                self._context,
                parent,
                since_epoch(call.arrived),
                since_epoch(ended_ns),
                attributes=attributes,
                error=self._error,
            ),
        )
        # They follow one another and end when the orchestrator is asked.
        encoded = call.sent - call.encode
        for name, began, ended in (("render", encoded - call.render, encoded), ("encode", encoded, call.sent)):
            if ended > began:
                self._telemetry.record(opened.generation_id, _below(self._context, name, began, ended))


def _below(parent: TraceContext, name: str, began_ns: int, ended_ns: int) -> Span:
    return Span(name, parent.child(), parent.span_id, since_epoch(began_ns), since_epoch(ended_ns))


def _request_attributes(opened: orchestrator_pb2.Opened, operation: str) -> dict[str, Attribute]:
    """What was asked for, without a word of it."""
    spec, sampling = opened.spec, opened.spec.sampling
    attributes: dict[str, Attribute] = {
        names.OPERATION_NAME: operation,
        names.PROVIDER_NAME: names.PROVIDER,
        names.REQUEST_MODEL: spec.model,
        names.RESPONSE_MODEL: spec.model,
        names.REQUEST_CHOICE_COUNT: spec.n,
        names.REQUEST_SEED: str(sampling.seed),  # 64 bits without a sign do not fit into OTLP's integer
        names.REQUEST_TEMPERATURE: sampling.temperature,
        names.REQUEST_TOP_K: sampling.top_k,
        names.REQUEST_TOP_P: sampling.top_p,
        names.REQUEST_PRESENCE_PENALTY: sampling.presence_penalty,
        names.REQUEST_FREQUENCY_PENALTY: sampling.frequency_penalty,
        names.REQUEST_STREAM: not spec.output.final_only,
        names.RESPONSE_ID: opened.generation_id,
        names.CONVERSATION_ID: opened.session_id,
        names.USAGE_INPUT_TOKENS: opened.prompt_tokens,
    }
    if spec.stop.max_tokens:
        attributes[names.REQUEST_MAX_TOKENS] = spec.stop.max_tokens
    return attributes
