"""One call's reading of one generation: takes tokens in as they come, gives events out as fast as they are taken (R5).

What arrives while a write is pending joins the next event of its choice; cuts of messages never show. Knows nothing of
addresses (see `attachment.py`) and nothing of gRPC but the messages.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fermata.v1 import common_pb2, generation_pb2
from services.common import failpoints
from services.common.directory import Directory
from services.common.errors import FermataError, InternalError, SlowReader
from services.common.telemetry import Telemetry
from services.common.timings import CallMoments
from services.common.vocabulary import Vocabulary
from services.orchestrator.v1 import orchestrator_pb2
from services.tokenizer import events
from services.tokenizer.attachment import Attachment, Links
from services.tokenizer.events import ResponseType, TokensEvent
from services.tokenizer.figures import Figures
from services.tokenizer.reading import Arrived, ChoiceReading, Delta
from services.tokenizer.route import Route
from services.tokenizer.telling import Telling

MOST_ENDPOINTS = 4
HEARTBEAT_INTERVAL = 1.0
"""Seconds of silence after which a heartbeat is sent (R7)."""
SLOW_LIMIT = 10.0
"""Seconds that a write may be pending (R5)."""


@dataclass(slots=True)
class Face:
    """What all readers of this process say of it, know of its model, and count.

    Attributes:
        vocabulary: bytes of each id.
        eos_token_ids: the model's own end tokens.
        own: the address that this process has alone.
        others: addresses of all that can resume.
        telemetry: takes spans.
        figures: take counts.
        draining: this process is about to leave (R19).
    """

    vocabulary: Vocabulary
    eos_token_ids: Sequence[int]
    own: str
    others: Directory
    telemetry: Telemetry
    figures: Figures
    draining: bool = False

    @property
    def endpoints(self) -> list[str]:
        """Addresses that clients are told: this process's own and up to three others (R18)."""
        return [self.own, *(address for address in self.others.addresses() if address != self.own)][:MOST_ENDPOINTS]


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be read.

    Attributes:
        name: the generation.
        cursors: what the reader has.
        tails: ids that it hands back.
        call: of the call that opened it, when this is the one.
    """

    name: orchestrator_pb2.Name
    cursors: Sequence[common_pb2.Cursor] = ()
    tails: Sequence[common_pb2.Tail] = ()
    call: CallMoments | None = None


class Reader:
    """A reader. One task waits and takes; links and the ticker bring news."""

    def __init__(
        self,
        face: Face,
        links: Links,
        route: Route,
        target: Target,
        *,
        on_slow: Callable[[FermataError], None],
        on_left: Callable[[Reader], None],
    ) -> None:
        """Does not attach yet.

        Args:
            face: see there.
            links: where to attach.
            route: whom to ask.
            target: what to read.
            on_slow: ends the call of a reader that takes nothing; the handler itself waits for its write.
            on_left: the reader is not needed any more.
        """
        self._face = face
        self._target = target
        self._on_slow, self._on_left = on_slow, on_left
        self._attachment = Attachment(links, self, route)
        self._choices = _readings(target)
        self._hand_backs: dict[int, int] = {}
        self._opened: orchestrator_pb2.Opened | None = None
        self._unfinished = -1  # choices whose end was not told; unknown until attached
        self._announce = False
        self._final_only = False
        self._telling = Telling(face.telemetry, face.figures, target.call, self._attachment.trace)
        self._events_of: dict[int, TokensEvent[Any]] = {}
        self._moved: dict[int, ChoiceReading] = {}
        self._terminals: dict[int, orchestrator_pb2.Terminal] = {}
        self._beat = False
        self._failure: FermataError | None = None
        self._news = False
        self._waiter: asyncio.Future[None] | None = None
        # Nanoseconds of time.monotonic: a write began and is pending (else 0); the last one was done.
        self._writing_since_ns = 0
        self._told_ns = time.monotonic_ns()
        self._left = False

    def __enter__(self) -> Reader:
        self._attachment.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Nobody reads any more. Safe to call again."""
        if not self._left:
            self._left = True
            self._telling.close()
            self._attachment.leave()
            self._on_left(self)

    # --- the task that reads -----------------------------------------------------------------------------------

    async def wait(self) -> bool:
        """Waits for something to tell; False when all was told.

        Raises:
            FermataError: the reader was ended.
        """
        while not self._news:
            if self._left:  # ended from outside: its status is on the way
                return False
            if self._unfinished == 0:
                return False
            if self._failure is not None:
                self._telling.failed(self._failure)
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return True

    def take(self, kind: type[ResponseType]) -> Iterator[ResponseType]:
        """The events since the last time; each must be written before the next is asked for."""
        began_ns = 0
        for response, tokens in self._events(kind):
            failpoints.hit("tokenizer.event.before_write")
            self._writing_since_ns = now_ns = time.monotonic_ns()
            began_ns = began_ns or now_ns
            if tokens is not None:
                self._telling.leaves(tokens, now_ns)
            yield response
            self._told_ns, self._writing_since_ns = time.monotonic_ns(), 0
        self._telling.wrote_ns = began_ns, self._told_ns

    def _events(self, kind: type[ResponseType]) -> list[tuple[ResponseType, TokensEvent[Any] | None]]:
        """What there is to write; beside it the event, where it has tokens."""
        self._news = False
        beat, self._beat = self._beat, False
        moved, self._moved = self._moved, {}
        responses: list[tuple[ResponseType, TokensEvent[Any] | None]] = []
        if self._announce:
            self._announce = False
            response = kind()
            self._write_started(response.event.started)
            responses.append((response, None))
        for choice, reading in moved.items():
            if reading.has_news and not self._final_only:
                event = self._events_of.get(choice)
                if event is None:
                    event = self._events_of[choice] = TokensEvent(kind, choice)
                    event.occasions = self._telling.occasions(choice, reading.told_offset)
                responses.append((event.fill(reading, self._face.vocabulary), event))
            terminal = self._terminals.pop(choice, None) if self._terminals else None
            if terminal is not None:
                text = self._rest(reading).text if self._final_only else ""
                text += reading.finish(terminal.cut_bytes)
                self._telling.finished(terminal)
                self._unfinished -= 1
                response = kind()
                events.write_finished(response.event.finished, terminal, text)
                responses.append((response, None))
        if beat and (not responses or self._face.draining):  # whoever is busy must hear that, too (R19)
            response = kind()
            response.event.heartbeat.endpoints.extend(self._face.endpoints)
            response.event.heartbeat.draining = self._face.draining
            responses.append((response, None))
        return responses

    async def collect(self) -> generation_pb2.GenerateResponse:
        """Reads to the end and returns the whole."""
        whole = generation_pb2.GenerateResponse()
        choices: dict[int, generation_pb2.Choice] = {}
        while await self.wait():
            self._news = self._beat = False
            self._told_ns = time.monotonic_ns()
            if self._announce:
                self._announce = False
                whole.started.Clear()
                self._write_started(whole.started)
            for index, terminal in self._terminals.items():
                reading = self._choices[index]
                delta = self._rest(reading)
                choice = choices[index] = generation_pb2.Choice(
                    choice=index,
                    token_ids=delta.token_ids,
                    text=delta.text + reading.finish(terminal.cut_bytes),
                    logprobs=delta.logprobs,
                    top_logprobs=map(events.top_logprobs, delta.top_logprobs),
                )
                events.write_finished(choice.finished, terminal)
                self._telling.finished(terminal)
            self._unfinished -= len(self._terminals)
            self._terminals.clear()
        whole.choices.extend(choices[index] for index in sorted(choices))
        return whole

    def _rest(self, reading: ChoiceReading) -> Delta:
        """All of a choice that was not told: what only its end tells."""
        delta = reading.take(self._face.vocabulary)
        self._telling.collected(reading.choice, delta.first_offset, delta.moments)
        return delta

    def _write_started(self, started: generation_pb2.Started) -> None:
        assert self._opened is not None  # announced means opened
        eos_token_ids, endpoints = self._face.eos_token_ids, self._face.endpoints
        events.write_started(started, self._opened, eos_token_ids=eos_token_ids, endpoints=endpoints)

    # --- what links say ----------------------------------------------------------------------------------------

    def on_attached(self, attached: orchestrator_pb2.Attached) -> None:
        """The reader is served: first by whom and from where on (R20: told again when the fingerprint changed)."""
        self._attachment.on_attached()
        self._hand_backs.clear()
        previous, opened = self._opened, attached.opened
        self._opened = opened
        self._final_only = opened.spec.output.final_only
        self._telling.opened(opened)
        if previous is None:
            self._unfinished = opened.spec.n
            for index in range(opened.spec.n):
                self._choices.setdefault(index, ChoiceReading(index))
        for start in attached.choices:
            reading = self._choices.get(start.choice)
            if reading is not None and not reading.begun:
                reading.begin(start.pending)
        changed = previous is not None and previous.HasField("fingerprint") and opened.HasField("fingerprint")
        if previous is None or (changed and previous.fingerprint != opened.fingerprint):
            self._announce = True
            self._wake()

    def on_tokens(self, choice: int, arrived: Arrived) -> None:
        """Tokens of one choice."""
        reading = self._choices.get(choice)
        try:
            if reading is None:
                raise InternalError(f"there is no choice {choice}")
            if reading.accept(arrived):
                self._moved[choice] = reading
                self._wake()
        except InternalError as error:
            self.fail(error)

    def on_finished(self, terminal: orchestrator_pb2.Terminal) -> None:
        """A choice has ended."""
        reading = self._choices.get(terminal.choice)
        if reading is None or reading.finished or terminal.choice in self._terminals:
            return  # told before the link broke
        if terminal.count != reading.count:
            counts = f"{terminal.count} tokens, but {reading.count} were delivered"
            self.fail(InternalError(f"choice {terminal.choice} ended after {counts}"))
            return
        self._terminals[terminal.choice] = terminal
        self._moved[terminal.choice] = reading
        self._wake()

    def on_ended(self, error: FermataError) -> None:
        """The orchestrator ended this reader."""
        self._attachment.on_ended(error)

    def on_broken(self, *, leaving: bool) -> None:
        """The link is gone."""
        self._face.figures.reattached()
        self._attachment.on_broken(leaving=leaving)

    # --- what the attachment asks ------------------------------------------------------------------------------

    def attach_message(self) -> orchestrator_pb2.Attach:
        """What is to be read, and from where on."""
        target = self._target
        if self._opened is None:
            cursors, tails = list(target.cursors), list(target.tails)
        else:
            if failpoints.planted("resume_off_by_one"):
                for reading in self._choices.values():
                    reading.skip_one()
            cursors = [
                common_pb2.Cursor(choice=index, count=reading.count, running_hash=reading.running_hash)
                for index, reading in self._choices.items()
            ]
            tails = []
        tails += [
            common_pb2.Tail(choice=choice, first_offset=count, token_ids=self._choices[choice].ids_from(count))
            for choice, count in self._hand_backs.items()
        ]
        name = target.name
        if self._opened is not None:
            name = orchestrator_pb2.Name(tenant=name.tenant, generation_id=self._opened.generation_id)
        return orchestrator_pb2.Attach(name=name, cursors=cursors, tails=tails)

    def hand_back(self, choice: int, count: int) -> bool:
        """Notes that the log lacks ids; False when this reader does not have them either."""
        reading = self._choices.get(choice)
        if self._opened is None or reading is None or reading.ids_from(count) is None:
            return False
        self._hand_backs[choice] = count
        return True

    def fail(self, error: FermataError) -> None:
        """Ends the reader; what arrived before is told first."""
        if self._failure is None:
            self._failure = error
            self._attachment.leave()
            self._wake(news=bool(self._moved or self._announce))

    # --- time --------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Called several times per second (`now` as of time.monotonic)."""
        self._attachment.tick(now)
        if self._writing_since_ns and now - self._writing_since_ns / 1e9 > SLOW_LIMIT:
            self._moved.clear()
            self.leave()
            self._on_slow(SlowReader(f"nothing was read for {SLOW_LIMIT:.0f} s; resume"))
        elif now - self._told_ns / 1e9 >= HEARTBEAT_INTERVAL and not self._writing_since_ns:
            self.beat()

    def beat(self) -> None:
        """Makes the stream say that it is alive, once it has begun."""
        if self._opened is not None:
            self._beat = True
            self._wake()

    def _wake(self, *, news: bool = True) -> None:
        self._news = self._news or news
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _readings(target: Target) -> dict[int, ChoiceReading]:
    """What a reader has, by its own words."""
    tails = {tail.choice: tail for tail in target.tails}
    readings = {}
    for cursor in target.cursors:
        tail = tails.get(cursor.choice)
        first_offset = tail.first_offset if tail is not None else cursor.count
        held_ids: Sequence[int] = tail.token_ids if tail is not None else ()
        readings[cursor.choice] = ChoiceReading(cursor.choice, first_offset, held_ids, cursor.running_hash)
    return readings
