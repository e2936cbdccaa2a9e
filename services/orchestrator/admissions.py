"""Which choice runs on which shard: placement, attempts, grants, release (R11).

Knows links and generations; not readers, logs or stores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable

from services.common.directory import Directory
from services.common.errors import FingerprintMismatch, NoShard
from services.orchestrator.convert import admit_message
from services.orchestrator.generation import Generation
from services.orchestrator.observer import Admission, Observer
from services.orchestrator.placement import ShardView, choose_shard
from services.orchestrator.sequence import Sequence
from services.orchestrator.shards import LinkListener, ShardLink

DIRECTORY_INTERVAL = 0.1
"""Seconds between looks at who is there."""


class Admissions:
    """All admissions of this process.

    Attributes:
        links: by address: to each shard that the directory knows, and to those that have left it but still answer.
    """

    def __init__(self, shards: Directory, listener: LinkListener, observer: Observer, *, window: int) -> None:
        """`window` is how many tokens a shard may run ahead; `listener` is told what the links say."""
        self.links: dict[str, ShardLink] = {}
        self._shards, self._listener = shards, listener
        self._observer = observer
        self._window = window
        self._admitted: dict[int, Admission] = {}
        self._linked = asyncio.Event()

    async def run(self) -> None:
        """Keeps a link to every shard until cancelled.

        A link that lives is kept although its shard has left the directory: the shard drains, and says so itself.
        """
        tasks: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                known = set(self._shards.addresses())
                for address in known - tasks.keys():
                    link = self.links[address] = ShardLink(address, self._listener)
                    tasks[address] = group.create_task(link.run(), name=f"link to {address}")
                for address in [item for item in tasks.keys() - known if not self.links[item].ready]:
                    tasks.pop(address).cancel()
                    del self.links[address]
                await asyncio.sleep(DIRECTORY_INTERVAL)

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence; 0 while no shard was ever seen."""
        return max((link.context_length for link in self.links.values()), default=0)

    def preferred_link(self, session: str = "") -> ShardLink:
        """The shard that a session would begin on now.

        Raises:
            NoShard: none answers.
        """
        view = choose_shard(self._views(), session=session, fingerprint=None, exact=False)
        if view is None:
            raise NoShard("no shard answers; retry", retry_delay=1.0)
        return self.links[view.address]

    def linked(self) -> None:
        """A link became ready."""
        self._linked.set()

    async def first_link(self, seconds: float) -> bool:
        """Waits until a shard is linked; False when none is in time."""
        try:
            async with asyncio.timeout(seconds):
                await self._linked.wait()
        except TimeoutError:
            return False
        return True

    def admit(self, generation: Generation) -> bool:
        """Brings every running choice to a shard, from where its log stands.

        Returns:
            True when the generation runs now on another fingerprint than before (R20). Without any shard nothing
            happens: it is admitted when a link is ready.

        Raises:
            FingerprintMismatch: `exact` was asked for, and the shards that answer are different.
        """
        running = list(generation.running())
        if not generation.active or generation.attempts or not running:
            return False
        views = self._views()
        expected = generation.fingerprint or generation.spec.fingerprint
        view = choose_shard(views, session=generation.name.session, fingerprint=expected, exact=generation.spec.exact)
        if view is None:
            if views and generation.spec.exact:
                raise FingerprintMismatch("no shard has the fingerprint that this generation began on")
            return False
        link = self.links[view.address]
        leader: int | None = None
        for sequence in running:
            sequence.granted = sequence.count + self._window
            admission = self._observer.admission(generation, sequence, link.process_id)
            message = admit_message(
                generation, sequence, grant=sequence.granted, fork_of=leader, context=admission.context
            )
            attempt = link.admit(message)
            generation.attempts[sequence.choice] = attempt
            self._admitted[attempt] = admission
            leader = leader or attempt
        changed = generation.fingerprint is not None and generation.fingerprint != link.fingerprint
        generation.link, generation.fingerprint = link, link.fingerprint
        return changed

    def find(self, attempt: int) -> tuple[Generation, Sequence] | None:
        """What an attempt stands for; None when it is over."""
        admission = self._admitted.get(attempt)
        return admission[:2] if admission is not None else None

    def ended(self, attempt: int, error: str) -> tuple[Generation, Sequence] | None:
        """Notes that the shard ended an attempt by itself, with a reason, and tells what it stood for."""
        admission = self._admitted.pop(attempt, None)
        if admission is None:
            return None
        admission.generation.attempts.pop(admission.sequence.choice, None)
        self._observer.admission_over(admission, error)
        return admission[:2]

    def end(self, generation: Generation, choice: int) -> None:
        """Frees the shard of one choice."""
        attempt = generation.attempts.pop(choice, None)
        if attempt is not None:
            admission = self._admitted.pop(attempt, None)
            if admission is not None:
                self._observer.admission_over(admission)
            if generation.link is not None and generation.link.ready:
                generation.link.release(attempt)

    def release(self, generation: Generation) -> None:
        """Takes a generation off its shard."""
        for choice in list(generation.attempts):
            self.end(generation, choice)
        generation.link = None

    def renew_grants(self, generations: Collection[Generation]) -> None:
        """Lets shards run on while somebody wants the tokens.

        When one of these generations needs a grant the others get theirs along with it, though they could do without:
        sequences that run together would otherwise need a message in every step, each for a few of them.
        """
        if any(generation.needs_grants(self._window) for generation in generations):
            for generation in generations:
                if generation.link is not None:
                    for attempt, count in generation.renewed_grants(self._window):
                        generation.link.grant(attempt, count)

    def trace(self, generation_ids: Iterable[str]) -> None:
        """Has the steps of generations handed to the collector of spans, by whichever shard remembers them."""
        for link in self.links.values():
            if link.ready:
                link.trace(generation_ids)

    def broken(self, link: ShardLink, generations: Iterable[Generation]) -> list[Generation]:
        """Notes that a link is gone with all that was admitted on it; returns whose admissions these were."""
        orphaned = [generation for generation in generations if generation.link is link]
        for generation in orphaned:
            for attempt in generation.attempts.values():
                admission = self._admitted.pop(attempt, None)
                if admission is not None:
                    self._observer.admission_over(admission, NoShard.reason)
            generation.attempts.clear()
            generation.link = None
        return orphaned

    def _views(self) -> list[ShardView]:
        return [link.view for link in self.links.values() if link.ready]
