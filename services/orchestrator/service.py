"""The calls of the orchestrator: check, call the room behind, answer. Errors are mapped by the interceptor.

Knows messages; decides nothing about generations.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator

from fermata.v1 import generation_pb2
from services.common import rpc
from services.common.errors import Draining, FermataError, GenerationNotFound, NotYetSupported
from services.common.types import VERSION, FinishReason, pack_ids
from services.orchestrator.convert import (
    cursors_from_messages,
    fingerprint_to_message,
    opened_message,
    session_message,
    tails_from_messages,
    terminal_message,
)
from services.orchestrator.generation import GenerationName
from services.orchestrator.observer import Observer
from services.orchestrator.opening import Opener
from services.orchestrator.owner import STORE_PATIENCE, Owner
from services.orchestrator.readers import ReadStream
from services.orchestrator.recovery import Recovery
from services.orchestrator.session_records import PARKED, join_generation_id
from services.orchestrator.session_tree import path_from_root
from services.orchestrator.sessions import SessionStore
from services.orchestrator.v1 import orchestrator_pb2
from services.orchestrator.v1.orchestrator_pb2_grpc import OrchestratorServiceServicer

log = logging.getLogger(__name__)

TICK_INTERVAL = 0.25
"""Seconds between looks at heartbeats, silent links and slow streams."""
FIRST_LINK_TIMEOUT = 10.0
"""Seconds that the start waits for a shard; afterwards it serves without."""


class OrchestratorService(OrchestratorServiceServicer):
    """Owns generations: their log, their end, their readers."""

    def __init__(
        self, store: SessionStore, owner: Owner, recovery: Recovery, observer: Observer, process_id: str
    ) -> None:
        """Puts a face on the parts; `start` sets them going."""
        self.store = store
        self.owner = owner
        self.recovery = recovery
        self._opener = Opener(store, owner, recovery, observer)
        self._observer = observer
        self._process_id = process_id
        self._streams: set[ReadStream] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Connects the store, sets all parts going in `group`, and waits a while for the first shard.

        A part that fails takes the group with it, and so the process: others take over what it owned.

        Raises:
            SessionStoreUnavailable: the store does not answer.
        """
        await self.store.connect()
        parts = [self.owner.writer.run(), self.recovery.keep_lease(), self.recovery.sweep(), self.tick()]
        self._tasks = [group.create_task(part) for part in (*parts, self.owner.admissions.run())]
        await self.owner.admissions.first_link(FIRST_LINK_TIMEOUT)

    async def stop(self) -> None:
        """Ends all parts as they are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self.store.close()

    def load(self) -> dict[str, float]:
        """How busy this process is."""
        return {"generations": len(self.owner.generations), "links": len(self._streams)}

    # --- generations -------------------------------------------------------------------------------------------

    async def Open(self, request: orchestrator_pb2.OpenRequest, context: rpc.Context) -> orchestrator_pb2.OpenResponse:
        """Makes a generation durable and starts it."""
        self._refuse_when_draining()
        name, created = await self._opener.open(request)
        return orchestrator_pb2.OpenResponse(session_id=name.session, generation_id=name.generation_id, created=created)

    async def Cancel(
        self, request: orchestrator_pb2.CancelRequest, context: rpc.Context
    ) -> orchestrator_pb2.CancelResponse:
        """Ends a generation; what had ended stays as it is."""
        generation = await self.recovery.find(await self._name(request.name))
        if not generation.ended:
            self.owner.finish(generation, FinishReason.CANCELLED)
            await self.owner.writer.settle(lambda: generation.stored or not generation.active, STORE_PATIENCE)
        terminals = [terminal_message(sequence) for sequence in generation.sequences]
        return orchestrator_pb2.CancelResponse(terminals=terminals)

    async def GetGeneration(
        self, request: orchestrator_pb2.GetGenerationRequest, context: rpc.Context
    ) -> orchestrator_pb2.GetGenerationResponse:
        """What the log has; takes nothing over."""
        name = await self._name(request.name)
        generation, session = await self.recovery.read(name)
        state = generation_pb2.GENERATION_STATE_RUNNING
        if generation.ended:
            state = generation_pb2.GENERATION_STATE_FINISHED
        elif session.state == PARKED:
            state = generation_pb2.GENERATION_STATE_PARKED
        return orchestrator_pb2.GetGenerationResponse(
            opened=opened_message(generation),
            state=state,
            output_token_ids=[pack_ids(sequence.token_ids) for sequence in generation.sequences],
            terminals=[terminal_message(item) for item in generation.sequences if item.ending is not None],
            create_time_ms=generation.created_ms,
        )

    async def _name(self, name: orchestrator_pb2.Name) -> GenerationName:
        """By its id, or by the request that made it (R14)."""
        if name.generation_id:
            return GenerationName.parse(name.tenant, name.generation_id)
        if not name.request_id:
            raise GenerationNotFound("neither generation_id nor request_id is given")
        session, generation = await self.store.ids_for(name.tenant, name.request_id, name.session_id)
        return GenerationName(name.tenant, session, generation)

    # --- sessions ----------------------------------------------------------------------------------------------

    async def OpenSession(
        self, request: orchestrator_pb2.OpenSessionRequest, context: rpc.Context
    ) -> orchestrator_pb2.OpenSessionResponse:
        """The turns that lead to the place where a session goes on (R17)."""
        session = await self.store.load_session(request.tenant, request.session_id)
        records = await self.store.load_generations(request.tenant, request.session_id, session.generations)
        last = session.generations[-1]
        if request.generation_id:
            last = GenerationName.parse(request.tenant, request.generation_id).generation
        path = path_from_root({record.generation: record for record in records}, last)
        if request.choice >= path[-1].choices:
            raise GenerationNotFound(f"the generation has no choice {request.choice}")
        turns = []
        for record, child in zip(path, [*path[1:], None], strict=True):
            choice = child.parent.choice if child is not None else request.choice
            terminal = record.terminals.get(choice)
            parent = record.parent
            turns.append(
                orchestrator_pb2.Turn(
                    generation_id=join_generation_id(record.session, record.generation),
                    parent=orchestrator_pb2.Branch(
                        generation_id=join_generation_id(record.session, parent.generation)
                        if parent.generation
                        else "",
                        choice=parent.choice,
                        count=parent.count,
                    ),
                    prompt_token_ids=pack_ids(record.prompt_ids),
                    messages=record.messages,
                    output_token_ids=pack_ids(record.logs[choice]),
                    cut_bytes=terminal.cut_bytes if terminal is not None else 0,
                )
            )
        return orchestrator_pb2.OpenSessionResponse(turns=turns, generation_count=len(session.generations))

    async def GetSession(
        self, request: orchestrator_pb2.GetSessionRequest, context: rpc.Context
    ) -> orchestrator_pb2.GetSessionResponse:
        """A session with its tree."""
        session = await self.store.load_session(request.tenant, request.session_id)
        records = await self.store.load_generations(request.tenant, request.session_id, session.generations)
        return orchestrator_pb2.GetSessionResponse(session=session_message(session, records))

    async def ListSessions(
        self, request: orchestrator_pb2.ListSessionsRequest, context: rpc.Context
    ) -> orchestrator_pb2.ListSessionsResponse:
        """One page of sessions, newest first."""
        sessions, token = await self.store.list_sessions(request.tenant, request.page_size, request.page_token)
        messages = [session_message(session, []) for session in sessions]
        return orchestrator_pb2.ListSessionsResponse(sessions=messages, next_page_token=token)

    # --- this process ------------------------------------------------------------------------------------------

    async def Identify(
        self, request: orchestrator_pb2.IdentifyRequest, context: rpc.Context
    ) -> orchestrator_pb2.IdentifyResponse:
        """Who this is: the answer that tells a prober that an owner lives (R9)."""
        link = next((link for link in self.owner.admissions.links.values() if link.ready), None)
        return orchestrator_pb2.IdentifyResponse(
            process_id=self._process_id,
            version=VERSION,
            fingerprint=fingerprint_to_message(link.fingerprint) if link else None,
            context_length=self.owner.admissions.context_length,
            store_calls=self.store.calls,
            store_flushes=self.store.flushes,
            stored_tokens=self.store.appended_tokens,
            wasted_tokens=self.owner.wasted_tokens,
        )

    async def Read(
        self, request_iterator: AsyncIterator[orchestrator_pb2.ReadRequest], context: rpc.Context
    ) -> AsyncIterator[orchestrator_pb2.ReadResponse]:
        """Serves all readers of one tokenizer process."""
        stream = ReadStream(
            is_cut_off=lambda: self.owner.writer.cut_off,
            on_done=self.owner.on_done,
            with_moments=self._observer.active,
        )
        self._streams.add(stream)
        requests = asyncio.create_task(self._take_requests(stream, request_iterator))
        try:
            async for response in stream.responses():
                yield response
        finally:
            self._streams.discard(stream)
            requests.cancel()
            self.owner.detach_all(stream)

    async def _take_requests(
        self, stream: ReadStream, request_iterator: AsyncIterator[orchestrator_pb2.ReadRequest]
    ) -> None:
        """Applies what the other end asks for, until it closes its side."""
        attaching: dict[int, asyncio.Task[None]] = {}
        try:
            async for request in request_iterator:
                stream.acknowledge(request.acknowledged)
                if request.traced_generations:
                    self.owner.admissions.trace(request.traced_generations)
                for attach in request.attaches:
                    task = asyncio.create_task(self._attach(stream, attach))
                    attaching[attach.reader] = task
                    task.add_done_callback(functools.partial(_forget, attaching, attach.reader))
                for number in request.detaches:
                    pending = attaching.get(number)
                    if pending is not None:
                        pending.cancel()
                    self.owner.detach(stream, number)
        finally:
            for task in list(attaching.values()):
                task.cancel()
            stream.close()

    async def _attach(self, stream: ReadStream, attach: orchestrator_pb2.Attach) -> None:
        """Finds the generation, or takes it over, and begins to serve the reader."""
        try:
            self._refuse_when_draining()
            generation = await self.recovery.find(await self._name(attach.name))
            cursors, tails = cursors_from_messages(attach.cursors), tails_from_messages(attach.tails)
            self.owner.attach(stream, attach.reader, generation, cursors, tails)
        except FermataError as error:
            stream.end(attach.reader, error)
        except Exception as error:
            stream.end(attach.reader, rpc.internal_error(error))

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise Draining("this orchestrator is about to leave; ask another one")

    async def tick(self) -> None:
        """Keeps time for streams and links, until cancelled."""
        while True:
            await asyncio.sleep(TICK_INTERVAL)
            now = time.monotonic()
            for stream in self._streams:
                stream.tick(now)
            self.owner.tick()

    async def drain(self) -> None:
        """Gives everything up so that others can go on with it (R19)."""
        self._draining = True
        for stream in self._streams:
            stream.drain()
        await self.owner.hand_over()
        for stream in self._streams:
            stream.close()
        await self.store.release_lease()

    # --- not yet -----------------------------------------------------------------------------------------------

    async def ListGenerations(
        self, request: orchestrator_pb2.ListGenerationsRequest, context: rpc.Context
    ) -> orchestrator_pb2.ListGenerationsResponse:
        """Not supported yet."""
        raise NotYetSupported("ListGenerations is not supported yet")

    async def ForkSession(
        self, request: orchestrator_pb2.ForkSessionRequest, context: rpc.Context
    ) -> orchestrator_pb2.ForkSessionResponse:
        """Not supported yet."""
        raise NotYetSupported("ForkSession is not supported yet")

    async def UpdateSession(
        self, request: orchestrator_pb2.UpdateSessionRequest, context: rpc.Context
    ) -> orchestrator_pb2.UpdateSessionResponse:
        """Not supported yet."""
        raise NotYetSupported("UpdateSession is not supported yet")

    async def DeleteSession(
        self, request: orchestrator_pb2.DeleteSessionRequest, context: rpc.Context
    ) -> orchestrator_pb2.DeleteSessionResponse:
        """Not supported yet."""
        raise NotYetSupported("DeleteSession is not supported yet")

    async def Score(
        self, request: orchestrator_pb2.ScoreRequest, context: rpc.Context
    ) -> orchestrator_pb2.ScoreResponse:
        """Not supported yet."""
        raise NotYetSupported("Score is not supported yet")


def _forget(tasks: dict[int, asyncio.Task[None]], number: int, _: asyncio.Task[None]) -> None:
    tasks.pop(number, None)
