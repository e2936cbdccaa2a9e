"""The stream of the sync client: reads events, and resumes by itself (R18).

Knows calls and threads; what a message means and what to do about a failure is decided in `stream.py` and `resume.py`.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import weakref
from types import TracebackType
from typing import Any, Self

import grpc

from fermata.errors import FermataError, Unavailable, from_rpc_error
from fermata.events import Event
from fermata.links import Link, Links, sleep_until
from fermata.resume import SILENCE, Where
from fermata.stream import CANCEL_TIMEOUT, EARLY_END, LAST_WORDS_TIMEOUT, SILENT, StreamState
from fermata.trace_context import trace_metadata
from fermata.v1 import generation_pb2

_WATCH_INTERVAL = 0.25


class Watch:
    """One thread for all streams of a client: cancels the call of a reader that waits too long (R7).

    The thread runs while there are streams, which it does not keep alive.
    """

    def __init__(self) -> None:
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._running = False

    def add(self, stream: Stream) -> None:
        """Watches a stream until it is dropped or removed."""
        with self._lock:
            self._streams.add(stream)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="fermata-watch", daemon=True).start()

    def remove(self, stream: Stream) -> None:
        """Stops watching a stream."""
        with self._lock:
            self._streams.discard(stream)

    def _run(self) -> None:
        while True:
            time.sleep(_WATCH_INTERVAL)
            with self._lock:
                streams = list(self._streams)
                if not streams:
                    self._running = False
                    return
            now = time.monotonic()
            for stream in streams:
                stream.check_silence(now)
            del streams, stream  # so that a stream that its reader forgot can end


class Stream(StreamState):
    """An iterator of the events of one generation; see `fermata.Event`.

    It resumes by itself: no token is lost, none comes twice. One thread at a time may iterate; any may close. `close`,
    or leaving a `with`, before the end cancels the generation; `leave` lets it be.
    """

    def __init__(self, links: Links, watch: Watch, timeout: float | None, **state: Any) -> None:
        # A running StreamGenerate or Resume; the messages of both have an `event`.
        self._call: Any = None
        super().__init__(**state, give_up_after=links.give_up_after)
        self._links = links
        self._watch = watch
        self._timeout = timeout
        self._deadline = math.inf
        self._link: Link | None = None
        self._opened = False
        self._waiting_since = math.inf  # when the read in progress began
        self._patience = SILENCE
        self._silent = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        while not (self._over or self.complete):
            call = self._call
            if call is None:
                self._open()
                continue
            self._waiting_since = time.monotonic()
            try:
                message = next(call)
                self._waiting_since = math.inf
                event = self._receive(message.event)
            except StopIteration:
                self._recover(Unavailable(EARLY_END, reason=""))
            except grpc.RpcError as error:
                self._broken(error)
            except FermataError as error:
                self._recover(error)
            else:
                if event is not None:
                    return event
                if self._draining:
                    self._move()
        self._finish()
        raise StopIteration

    def close(self) -> None:
        """Ends the reading; before the end of the generation this cancels it (R6), unless it is detached."""
        unfinished = self._opened and not (self._over or self.complete)
        self.leave()
        if unfinished and self._cancels:
            request = generation_pb2.CancelRequest(generation=self._current_name())
            # Should nobody answer now, the server parks the generation, for its last reader is gone.
            with contextlib.suppress(FermataError):
                self._links.call(lambda link: link.generations.Cancel, request, CANCEL_TIMEOUT)

    def leave(self) -> None:
        """Ends the reading and lets the generation be: it is parked, or goes on if it is detached."""
        self._over = True
        self._watch.remove(self)
        self._drop_call()
        self._drop_link()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # gRPC keeps a call alive that nobody reads; the server parks a generation only when it ends.
        if self._call is not None:
            self._call.cancel()

    def check_silence(self, now: float) -> None:
        """Cancels a call whose reader has waited too long for a message; called by the watch."""
        call = self._call
        if call is not None and now - self._waiting_since >= self._patience:
            self._silent = True
            call.cancel()

    def _open(self) -> None:
        """Makes one attempt at a call, after the delay that the last failure asked for."""
        if not self._opened:
            self._opened = True
            self._deadline = math.inf if self._timeout is None else time.monotonic() + self._timeout
            self._watch.add(self)
        try:
            if self._delay:
                sleep_until(time.monotonic() + self._delay, self._deadline)
            if self._link is None:
                self._link = self._find_link()
            self._call = self._start(self._link)
        except FermataError as error:
            self._recover(error)

    def _find_link(self) -> Link:
        if not self._recovery.troubled:
            return self._links.hold()
        return self._links.race(self._places(self._links.home, self._links.known), deadline=self._deadline)

    def _start(self, link: Link) -> Any:
        self._attach()
        self._silent = False
        timeout = None if math.isinf(self._deadline) else max(0.0, self._deadline - time.monotonic())
        if self._exists:
            return link.generations.Resume(self._resume_message(), timeout=timeout, metadata=trace_metadata())
        return link.generations.StreamGenerate(self._generate_message(), timeout=timeout, metadata=trace_metadata())

    def _broken(self, error: grpc.RpcError) -> None:
        if self._over:
            return  # closed by another thread
        self._recover(Unavailable(SILENT, reason="") if self._silent else from_rpc_error(error))

    def _recover(self, error: FermataError) -> None:
        """Prepares the next attempt; raises the error when there is none to be made."""
        self._drop_call()
        try:
            remedy = self._failed(error, time.monotonic())
        except FermataError:
            self.leave()
            raise
        if remedy.where is Where.OTHER_LINK:
            self._drop_link(broken=True)

    def _move(self) -> None:
        """Goes to another endpoint because this one is about to leave; stays when there is no other."""
        self._draining = False  # the next heartbeat says it again
        if self._link is None:
            return
        self._links.discard(self._link)
        self._failed_address = self._link.endpoint.address
        try:
            link = self._links.race(self._places(self._links.home, self._links.known), serving_only=True)
        except Unavailable:
            return
        self._drop_call()
        self._drop_link()
        self._link = link

    def _finish(self) -> None:
        """Lets the call end by itself, so that the server sees it complete."""
        if self._call is not None and self.complete:
            self._patience = LAST_WORDS_TIMEOUT
            self._waiting_since = time.monotonic()
            with contextlib.suppress(StopIteration, grpc.RpcError):
                next(self._call)
        self.leave()

    def _drop_call(self) -> None:
        call, self._call = self._call, None
        self._waiting_since = math.inf
        if call is not None:
            call.cancel()

    def _drop_link(self, *, broken: bool = False) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        self._failed_address = link.endpoint.address
        self._links.known = self._reading.endpoints or self._links.known
        if broken:
            self._links.discard(link)
        self._links.release(link)
