"""Finding a generation: in memory, at its owner, or in the session store, from which it is rebuilt and taken over.

Knows who owns what (R9, R10) and how a log becomes a `Generation` again (R1); not how it goes on, which is `owner.py`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict
from collections.abc import Sequence as Items
from dataclasses import replace

from grpc import aio

from services.common import failpoints, rpc
from services.common.errors import (
    FermataError,
    GenerationNotFound,
    OwnerElsewhere,
    SessionNotFound,
    SessionStoreUnavailable,
)
from services.common.failpoints import planted
from services.common.logs import bound
from services.common.types import pack_ids
from services.orchestrator.convert import spec_from_message
from services.orchestrator.generation import Generation, GenerationName
from services.orchestrator.observer import Observer
from services.orchestrator.owner import Owner
from services.orchestrator.sequence import Sequence
from services.orchestrator.session_records import (
    PARKED,
    BranchPoint,
    Claimed,
    GenerationRecord,
    NewGeneration,
    SessionRecord,
)
from services.orchestrator.session_tree import context_before, path_from_root
from services.orchestrator.sessions import SessionStore
from services.orchestrator.v1 import orchestrator_pb2
from services.orchestrator.v1.orchestrator_pb2_grpc import OrchestratorServiceStub

log = logging.getLogger(__name__)

PROBE_TIMEOUT = 1.0
"""Seconds of silence after which an owner counts as dead (R9)."""
LEASE_INTERVAL = 1.0
SWEEP_INTERVAL, SWEEP_JITTER = 2.0, 1.0


class Recovery:
    """Finds generations for the calls of this process, and adopts orphans.

    One lock per generation, so that two readers who come at once make one claim.
    """

    def __init__(
        self,
        store: SessionStore,
        owner: Owner,
        observer: Observer,
        *,
        table: Items[bytes],
        process_id: str,
        default_context: int,
    ) -> None:
        """Makes a finder.

        Args:
            store: of the logs.
            owner: takes what is claimed.
            observer: is told what was.
            table: bytes of each id, for stop strings.
            process_id: of this process, as the store knows owners.
            default_context: most tokens of a sequence while no shard has said so.
        """
        self._store = store
        self._owner = owner
        self._observer = observer
        self._table = table
        self._process_id = process_id
        self._default_context = default_context
        self._locks: defaultdict[GenerationName, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._rewriting: set[asyncio.Task[None]] = set()

    async def find(self, name: GenerationName) -> Generation:
        """The generation, ready to be read here: owned by this process, or ended.

        Raises:
            GenerationNotFound, SessionNotFound: it is not in the store.
            OwnerElsewhere: a living process owns it.
            SessionStoreUnavailable: the store does not answer.
        """
        lock = self._locks[name]
        try:
            async with lock:
                with bound(generation_id=name.generation_id, session_id=name.session):
                    return await self._find(name)
        finally:
            if not lock.locked():
                self._locks.pop(name, None)

    async def read(self, name: GenerationName) -> tuple[Generation, SessionRecord]:
        """What the store has of a generation; takes nothing over. Raises as `find`, but for OwnerElsewhere."""
        session = await self._session_of(name)
        return await self._load(name, session), session

    async def is_owned_elsewhere(self, session: SessionRecord) -> bool:
        """Whether another process that still answers owns the session's open generation.

        This process never is: what it owns is in its memory, and what is not there it gave up, or opened by a call
        whose answer was lost.
        """
        if session.state == PARKED or session.owner == self._process_id:
            return False
        return await self._is_alive(session.owner, session.address)

    def build(self, new: NewGeneration, context: list[int], record: GenerationRecord | None = None) -> Generation:
        """A `Generation` from what it was opened as; with a record from its log, too."""
        spec = spec_from_message(orchestrator_pb2.GenerationSpec.FromString(new.spec))
        length = self._owner.admissions.context_length or self._default_context
        resampled = record is not None and planted("resampled_tail") and not record.finished
        if resampled:
            spec = replace(spec, sampling=replace(spec.sampling, seed=spec.sampling.seed + 1))
        sequences = []
        for choice in range(spec.choices):
            sequence = Sequence(choice, len(context), spec.stop, table=self._table, context_length=length)
            if record is not None:
                logged = record.logs[choice][:-4] if resampled else record.logs[choice]
                sequence.restore(logged, record.terminals.get(choice))
            sequences.append(sequence)
        name = GenerationName(new.tenant, new.session, new.generation)
        return Generation(name, spec, new, context, sequences, fingerprint=spec.fingerprint)

    def rewrite(self, generation: Generation) -> None:
        """Brings a generation back into a store that went back in time or lost it (R10)."""
        task = asyncio.ensure_future(self._rewrite(generation))
        self._rewriting.add(task)
        task.add_done_callback(self._rewriting.discard)

    async def keep_lease(self) -> None:
        """Tells the sweeps of others that this process lives, until cancelled (R9)."""
        while True:
            try:
                await self._store.renew_lease()
            except SessionStoreUnavailable:
                log.debug("lease not renewed")
            await asyncio.sleep(LEASE_INTERVAL)

    async def sweep(self) -> None:
        """Adopts detached generations whose owner is gone, until cancelled (R9)."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL + random.uniform(-SWEEP_JITTER, SWEEP_JITTER))
            try:
                for tenant, session, generation, _ in await self._store.orphans():
                    name = GenerationName(tenant, session, generation)
                    log.warning("adopting %s", name)
                    try:
                        self._owner.admit(await self.find(name))
                    except (OwnerElsewhere, GenerationNotFound) as error:
                        log.info("%s: %s", name, error)
            except SessionStoreUnavailable:
                log.debug("no sweep: session store out of reach")

    async def _find(self, name: GenerationName) -> Generation:
        known = self._owner.generations.get(name)
        if known is not None:
            await self._owner.parked(known)
            known = self._owner.generations.get(name)
        if known is not None:
            return known
        began_ns = time.monotonic_ns()
        session = await self._session_of(name)
        loaded = await self._load(name, session)
        if loaded.ended and loaded.stored:
            loaded.active = False
            return loaded
        if await self.is_owned_elsewhere(session):
            raise _elsewhere(session.address)
        claim = await self._store.claim(name.tenant, name.session, name.generation, expected_owner=session.owner)
        if not isinstance(claim, Claimed):
            if not claim.finished:
                raise _elsewhere(claim.address)
            ended = await self._load(name, session)
            ended.active = False
            return ended
        failpoints.hit("orchestrator.claim.after")
        log.info("claimed %s, epoch %d", name, claim.epoch)
        # Read again: the former owner may have appended until the claim.
        generation = await self._load(name, session)
        generation.epoch = claim.epoch
        remaining = None
        if generation.record.deadline_ms:
            remaining = (generation.record.deadline_ms - await self._store.now_ms()) / 1000
        was_parked = session.state == PARKED
        self._observer.claimed(generation, began_ns, former_epoch=session.epoch, was_parked=was_parked)
        self._owner.adopt(generation, remaining=remaining)
        return generation

    async def _session_of(self, name: GenerationName) -> SessionRecord:
        session = await self._store.load_session(name.tenant, name.session)
        if name.generation not in session.generations:
            raise GenerationNotFound("no such generation", metadata={"generation_id": name.generation_id})
        return session

    async def _load(self, name: GenerationName, session: SessionRecord) -> Generation:
        records = await self._store.load_generations(name.tenant, name.session, session.generations)
        path = path_from_root({record.generation: record for record in records}, name.generation)
        record = path[-1]
        new = NewGeneration(
            tenant=name.tenant,
            session=name.session,
            generation=name.generation,
            new_session=not record.parent.generation,
            parent=record.parent,
            prompt_ids=pack_ids(record.prompt_ids),
            messages=record.messages,
            spec=record.spec,
            choices=record.choices,
            position=record.position,
            request_hash=record.request_hash,
            detached=record.detached,
            deadline_ms=record.deadline_ms,
            labels=session.labels,
        )
        generation = self.build(new, context_before(path), record)
        generation.created_ms = record.created_ms
        return generation

    async def _is_alive(self, process_id: str, address: str) -> bool:
        """Whether the process with this id still answers at this address (R9)."""
        channel = rpc.inside_channel(address)
        try:
            answer = await OrchestratorServiceStub(channel).Identify(
                orchestrator_pb2.IdentifyRequest(), timeout=PROBE_TIMEOUT
            )
            return answer.process_id == process_id
        except aio.AioRpcError:
            return False
        finally:
            await channel.close()

    async def _rewrite(self, generation: Generation) -> None:
        """Claims what the store still has, or opens it anew; the log is then written from memory."""
        name = generation.name
        try:
            try:
                session = await self._store.load_session(name.tenant, name.session)
            except SessionNotFound:
                await self._open_again(generation, new_session=True, parent_is_there=False)
            else:
                if name.generation in session.generations:
                    await self._claim_again(generation, session.owner)
                else:
                    parent = generation.record.parent.generation
                    await self._open_again(
                        generation, new_session=False, parent_is_there=not parent or parent in session.generations
                    )
        except SessionStoreUnavailable:
            pass  # the writer meets the refusal again
        except FermataError as error:
            log.error("%s cannot be written again: %s", name, error)
            self._owner.lose(generation)
            return
        for sequence in generation.sequences:
            sequence.durable_count, sequence.ending_stored = 0, False
            self._owner.writer.mark(generation, sequence)

    async def _claim_again(self, generation: Generation, owner: str) -> None:
        name = generation.name
        claim = await self._store.claim(name.tenant, name.session, name.generation, expected_owner=owner)
        if not isinstance(claim, Claimed):
            raise _elsewhere(claim.address)
        generation.epoch = claim.epoch

    async def _open_again(self, generation: Generation, *, new_session: bool, parent_is_there: bool) -> None:
        """Opens what the store has lost; without its parent it begins with its whole context."""
        log.error("%s is gone from the session store, writing it again", generation.name)
        record = replace(generation.record, new_session=new_session, expected_generation_count=None)
        if not parent_is_there:
            record = replace(record, parent=BranchPoint(), prompt_ids=pack_ids(generation.context))
        generation.epoch = (await self._store.open(record)).epoch


def _elsewhere(address: str) -> OwnerElsewhere:
    return OwnerElsewhere("another orchestrator owns this generation", metadata={"address": address})
