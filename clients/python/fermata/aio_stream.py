"""The stream of the async client: reads events, and resumes by itself (R18).

Knows calls and how to wait for them; what a message means and what to do about a failure is decided in `stream.py`
and `resume.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import weakref
from types import TracebackType
from typing import Any, Self

from grpc import aio

from fermata.aio_links import Link, Links
from fermata.dialing import CLOSED, NO_ANSWER
from fermata.errors import DeadlineExceeded, FermataError, Unavailable, from_rpc_error
from fermata.events import Event
from fermata.resume import SILENCE, Where
from fermata.stream import CANCEL_TIMEOUT, EARLY_END, LAST_WORDS_TIMEOUT, SILENT, StreamState
from fermata.trace_context import trace_metadata
from fermata.v1 import generation_pb2


class AsyncStream(StreamState):
    """An async iterator of the events of one generation; see `fermata.Event`.

    It resumes by itself: no token is lost, none comes twice. One task at a time may iterate. Cancelling that task is
    no failure: another iteration goes on. `aclose`, or leaving an `async with`, before the end cancels the
    generation; `leave` lets it be.
    """

    def __init__(self, links: Links, timeout: float | None, **state: Any) -> None:
        # A running StreamGenerate or Resume; the messages of both have an `event`.
        self._call: aio.UnaryStreamCall[Any, Any] | None = None
        super().__init__(**state, give_up_after=links.give_up_after)
        self._links = links
        self._timeout = timeout
        self._deadline: float | None = None
        self._link: Link | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._opened = False
        self._waiting_since = math.inf  # when the read in progress began
        self._silent = False
        self._cancellations = 0  # of the reading task when the call began

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not (self._over or self.complete):
            if self._call is None:
                await self._open()
                continue
            self._waiting_since = time.monotonic()
            try:
                message: Any = await self._call.read()
                self._waiting_since = math.inf
                if message is aio.EOF:
                    raise Unavailable(EARLY_END, reason="")
                event = self._receive(message.event)
            except aio.AioRpcError as error:
                self._recover(from_rpc_error(error))
            except FermataError as error:
                self._recover(error)
            except asyncio.CancelledError:
                self._cancelled()
            else:
                if event is not None:
                    return event
                if self._draining:
                    await self._move()
        await self._finish()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Ends the reading; before the end of the generation this cancels it (R6), unless it is detached."""
        unfinished = self._opened and not (self._over or self.complete)
        self.leave()
        if unfinished and self._cancels:
            request = generation_pb2.CancelRequest(generation=self._current_name())
            # Should nobody answer now, the server parks the generation, for its last reader is gone.
            with contextlib.suppress(FermataError):
                await self._links.call(lambda link: link.generations.Cancel, request, CANCEL_TIMEOUT)

    def leave(self) -> None:
        """Ends the reading and lets the generation be: it is parked, or goes on if it is detached."""
        self._over = True
        self._drop_call()
        self._drop_link()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # gRPC keeps a call alive that nobody reads; the server parks a generation only when it ends.
        if self._call is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._call.cancel)

    async def _open(self) -> None:
        """Makes one attempt at a call, after the delay that the last failure asked for."""
        if not self._opened:
            self._opened = True
            self._deadline = None if self._timeout is None else time.monotonic() + self._timeout
        try:
            async with asyncio.timeout(self._remaining()):
                if self._delay:
                    await asyncio.sleep(self._delay)
                if self._link is None:
                    self._link = await self._find_link()
        except TimeoutError:
            self._recover(DeadlineExceeded(NO_ANSWER, reason=""))
        except FermataError as error:
            self._recover(error)
        else:
            self._call = self._start(self._link)

    async def _find_link(self) -> Link:
        if not self._recovery.troubled:
            return self._links.hold()
        return await self._links.race(self._places(self._links.home, self._links.known))

    def _start(self, link: Link) -> aio.UnaryStreamCall[Any, Any]:
        self._attach()
        self._silent = False
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        self._cancellations = task.cancelling() if task is not None else 0
        self._watch(SILENCE)
        if self._exists:
            return link.generations.Resume(self._resume_message(), timeout=self._remaining(), metadata=trace_metadata())
        return link.generations.StreamGenerate(
            self._generate_message(), timeout=self._remaining(), metadata=trace_metadata()
        )

    def _recover(self, error: FermataError) -> None:
        """Prepares the next attempt; raises the error when there is none to be made."""
        self._drop_call()
        try:
            remedy = self._failed(error, time.monotonic())
        except FermataError:
            self._drop_link()
            raise
        if remedy.where is Where.OTHER_LINK:
            self._drop_link(broken=True)

    def _cancelled(self) -> None:
        """A read was cancelled: by the watch, with the task that reads, by an `aclose` elsewhere, with the client."""
        task = asyncio.current_task()
        with_task = task is not None and task.cancelling() > self._cancellations
        if self._silent and not with_task:
            self._recover(Unavailable(SILENT, reason=""))
        elif with_task:
            self._drop_call()  # another iteration resumes
            raise asyncio.CancelledError
        elif not self._over:
            self.leave()
            raise RuntimeError(CLOSED)

    async def _move(self) -> None:
        """Goes to another endpoint because this one is about to leave; stays when there is no other."""
        self._draining = False  # the next heartbeat says it again
        if self._link is None:
            return
        self._links.discard(self._link)
        self._failed_address = self._link.endpoint.address
        try:
            link = await self._links.race(self._places(self._links.home, self._links.known), serving_only=True)
        except Unavailable:
            return
        self._drop_call()
        self._drop_link()
        self._link = link

    async def _finish(self) -> None:
        """Lets the call end by itself, so that the server sees it complete."""
        if self._call is not None and self.complete:
            with contextlib.suppress(TimeoutError, aio.AioRpcError):
                await asyncio.wait_for(self._call.read(), LAST_WORDS_TIMEOUT)
        self.leave()

    def _remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _drop_call(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._call is not None:
            self._call.cancel()
        self._call = self._timer = None
        self._waiting_since = math.inf

    def _drop_link(self, *, broken: bool = False) -> None:
        if self._link is None:
            return
        self._failed_address = self._link.endpoint.address
        self._links.known = self._reading.endpoints or self._links.known
        if broken:
            self._links.discard(self._link)
        self._links.release(self._link)
        self._link = None

    def _watch(self, delay: float) -> None:
        # A weak reference: a stream that its reader forgot must end, for the server parks what nobody reads.
        method = weakref.WeakMethod(self._check_silence)
        self._timer = asyncio.get_running_loop().call_later(delay, _call_if_alive, method)

    def _check_silence(self) -> None:
        """Cancels a call whose reader has waited `SILENCE` seconds for a message (R7)."""
        if self._call is None:
            return
        silence = time.monotonic() - self._waiting_since  # minus infinity while nobody reads
        if silence < SILENCE:
            self._watch(SILENCE - max(silence, 0.0))
        else:
            self._silent = True
            self._call.cancel()


def _call_if_alive(method: weakref.WeakMethod[Any]) -> None:
    bound = method()
    if bound is not None:
        bound()
