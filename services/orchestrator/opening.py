"""Opening a generation: identity, place in its session, durable record, first admission (R8, R12, R14, R17).

Knows the Open call and the session tree; not what happens to the generation afterwards.
"""

from __future__ import annotations

import secrets
import time

from services.common import failpoints
from services.common.errors import ContextLengthExceeded, FieldViolation, InvalidRequest, PositionMismatch, SessionBusy
from services.common.types import FinishReason, unpack_ids
from services.orchestrator.convert import fingerprint_to_message
from services.orchestrator.generation import GenerationName
from services.orchestrator.observer import Observer
from services.orchestrator.owner import Owner
from services.orchestrator.recovery import Recovery
from services.orchestrator.session_records import BranchPoint, NewGeneration, split_generation_id
from services.orchestrator.session_tree import context_after, path_from_root
from services.orchestrator.sessions import SessionStore
from services.orchestrator.v1 import orchestrator_pb2


class Opener:
    """Opens generations for the calls of this process."""

    def __init__(self, store: SessionStore, owner: Owner, recovery: Recovery, observer: Observer) -> None:
        self._store = store
        self._owner = owner
        self._recovery = recovery
        self._observer = observer

    async def open(self, request: orchestrator_pb2.OpenRequest) -> tuple[GenerationName, bool]:
        """Makes a generation durable, then starts it. A retry with the same request_id finds its own (R14).

        Returns:
            Its name, and whether it is new.

        Raises:
            InvalidRequest, ContextLengthExceeded: the ids cannot be run.
            NoShard: nobody could run them.
            SessionNotFound, SessionBusy, SessionChanged, PositionMismatch, RequestIdReused: see their classes.
            SessionStoreUnavailable: without the store there is no new generation (R8).
        """
        opened_ns = time.monotonic_ns()
        session, generation = await self._store.ids_for(request.tenant, request.request_id, request.session_id)
        name = GenerationName(request.tenant, session, generation)
        context = await self._context(request) + unpack_ids(request.prompt_token_ids)
        spec = self._complete_spec(name, request.spec, context)
        deadline_ms = 0
        if spec.time_limit_ms:
            deadline_ms = await self._store.now_ms() + spec.time_limit_ms
        new = NewGeneration(
            tenant=name.tenant,
            session=name.session,
            generation=name.generation,
            new_session=not request.session_id,
            parent=_parent(request),
            prompt_ids=request.prompt_token_ids,
            messages=request.messages,
            spec=spec.SerializeToString(),
            choices=spec.n,
            position=len(context),
            request_hash=request.request_hash,
            detached=spec.detach,
            deadline_ms=deadline_ms,
            labels=dict(request.labels),
            expected_generation_count=request.generation_count if request.HasField("generation_count") else None,
        )
        failpoints.hit("orchestrator.open.before_store")
        try:
            opened = await self._store.open(new)
        except SessionBusy as busy:
            if not await self._free(name, busy):
                raise
            opened = await self._store.open(new)
        failpoints.hit("orchestrator.open.after_store")
        if opened.created:
            built = self._recovery.build(new, context)
            built.epoch = opened.epoch
            claimed_ns = time.monotonic_ns()
            self._owner.adopt(built, remaining=spec.time_limit_ms / 1000 if spec.time_limit_ms else None)
            self._owner.admit(built)
            built.opening = opened_ns, claimed_ns, time.monotonic_ns()
            self._observer.opened(built)
        return name, opened.created

    async def _context(self, request: orchestrator_pb2.OpenRequest) -> list[int]:
        """The ids before the prompt: those of the session up to the branch."""
        parent = _parent(request)
        if not parent.generation:
            return []
        session = await self._store.load_session(request.tenant, request.session_id)
        records = await self._store.load_generations(request.tenant, request.session_id, session.generations)
        path = path_from_root({record.generation: record for record in records}, parent.generation)
        context = context_after(path, parent.choice, parent.count)
        if request.HasField("expected_position") and request.expected_position != len(context):
            raise PositionMismatch(
                f"the session is at position {len(context)}, not {request.expected_position}",
                metadata={"position": str(len(context))},
            )
        return context

    def _complete_spec(
        self, name: GenerationName, spec: orchestrator_pb2.GenerationSpec, context: list[int]
    ) -> orchestrator_pb2.GenerationSpec:
        """Draws the seed, notes the fingerprint, and checks what only the shard's description tells."""
        link = self._owner.admissions.preferred_link(name.session)
        if not context:
            violation = FieldViolation("generation.input", "must give at least one token")
            raise InvalidRequest("the prompt is empty", violations=[violation])
        if max(context) >= link.vocabulary_size:
            violation = FieldViolation("generation.token_ids", f"ids must be below {link.vocabulary_size}")
            raise InvalidRequest("a token id is outside the vocabulary", violations=[violation])
        if len(context) >= link.context_length:
            raise ContextLengthExceeded(
                f"{len(context)} tokens leave no room in a context of {link.context_length}",
                metadata={"prompt_tokens": str(len(context)), "context_length": str(link.context_length)},
            )
        completed = orchestrator_pb2.GenerationSpec()
        completed.CopyFrom(spec)
        completed.n = spec.n or 1
        if not spec.sampling.HasField("seed"):
            completed.sampling.seed = secrets.randbits(64)
        completed.fingerprint.CopyFrom(fingerprint_to_message(link.fingerprint))
        return completed

    async def _free(self, name: GenerationName, busy: SessionBusy) -> bool:
        """Ends the session's open generation when it is nobody's: its owner is gone and it was not told to go on.

        Returns:
            True when the session is free now.
        """
        session = await self._store.load_session(name.tenant, name.session)
        open_name = GenerationName(name.tenant, name.session, session.active)
        if open_name == name or not session.active or open_name in self._owner.generations:
            return False
        if await self._recovery.is_owned_elsewhere(session):
            return False
        generation = await self._recovery.find(open_name)
        if generation.spec.detach:
            self._owner.admit(generation)
            return False
        self._owner.finish(generation, FinishReason.CANCELLED)
        return await self._owner.writer.settle(lambda: generation.stored, 1.0)


def _parent(request: orchestrator_pb2.OpenRequest) -> BranchPoint:
    parent = request.parent
    if not parent.generation_id:
        return BranchPoint()
    return BranchPoint(split_generation_id(parent.generation_id)[1], parent.choice, parent.count)
