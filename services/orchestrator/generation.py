"""One generation in the memory of its owner: what it was opened as, its choices, who reads them.

Pure bookkeeping and decisions: which grants to renew (R11), what a reader may see (R15), what the store lacks. Knows
neither gRPC nor Redis; `owner.py` acts on what this says.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.common.tracing import TraceContext, new_trace
from services.common.types import Fingerprint, SamplingProgram, StopRules
from services.orchestrator.sequence import Sequence
from services.orchestrator.session_records import NewGeneration, join_generation_id, split_generation_id

if TYPE_CHECKING:
    from services.orchestrator.readers import Reader
    from services.orchestrator.shards import ShardLink


@dataclass(frozen=True, slots=True)
class GenerationName:
    """Where a generation is found (R14). `generation` is the part after the dot of a generation_id."""

    tenant: str
    session: str
    generation: str

    @property
    def generation_id(self) -> str:
        """The public id."""
        return join_generation_id(self.session, self.generation)

    @classmethod
    def parse(cls, tenant: str, generation_id: str) -> GenerationName:
        """Inverse of `generation_id`.

        Raises:
            GenerationNotFound: no generation can have this id.
        """
        return cls(tenant, *split_generation_id(generation_id))


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """What a generation was asked to be, nothing unset.

    Attributes:
        sampling: the program of every choice.
        stop: when a choice ends.
        choices: how many (n).
        logprobs: readers get raw log-probabilities.
        top_logprobs: readers get this many most probable tokens.
        timings: readers get where the time of each token went (R25).
        committed: tokens are shown after the store has them (R15).
        detach: goes on without readers (R6).
        time_limit: seconds; 0 is none.
        exact: never goes on under another fingerprint (R20).
        priority: higher is admitted first.
        fingerprint: what it began on.
        trace: the span that all of its spans belong to.
    """

    sampling: SamplingProgram
    stop: StopRules
    choices: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    timings: bool = False
    committed: bool = False
    detach: bool = False
    time_limit: float = 0.0
    exact: bool = False
    priority: int = 0
    fingerprint: Fingerprint | None = None
    trace: TraceContext = field(default_factory=lambda: new_trace(sampled=False))


@dataclass(eq=False)
class Generation:
    """A generation that this process owns, or has read after its end.

    Attributes:
        name: where it is found.
        spec: what it was asked to be.
        record: what it was opened as, with `spec` as it is stored and echoed.
        context: ids before the first output token.
        sequences: the choices.
        epoch: of this ownership (R10).
        readers: who reads it here.
        link: the shard that runs it; None while none does.
        attempts: the current admission of each running choice (R11).
        fingerprint: of the shard that ran it last; None before the first.
        opening: when the call that opened it arrived, when the store had it, when it was first given to a shard, on
            this process's monotonic clock; None when another process opened it.
        owned_ns: when this ownership began, on the same clock.
        former: the span of the ownership before; None when this is the first.
        active: this process may append to it; False once it was parked, fenced or read after its end.
        parked: the session store knows that any process may go on with it.
    """

    name: GenerationName
    spec: GenerationSpec
    record: NewGeneration
    context: list[int]
    sequences: list[Sequence]
    epoch: int = 0
    created_ms: int = 0
    active: bool = True
    parked: bool = False
    fingerprint: Fingerprint | None = None
    opening: tuple[int, int, int] | None = None
    owned_ns: int = 0
    former: TraceContext | None = None
    link: ShardLink | None = None
    attempts: dict[int, int] = field(default_factory=dict)
    readers: set[Reader] = field(default_factory=set)

    @property
    def position(self) -> int:
        """Position of the first output token."""
        return len(self.context)

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that were in the KV cache when the first choice was admitted; None before."""
        return self.sequences[0].cached_tokens

    @property
    def ended(self) -> bool:
        """Every choice has ended."""
        return all(sequence.ending is not None for sequence in self.sequences)

    @property
    def stored(self) -> bool:
        """The session store has everything that there is."""
        return all(
            sequence.durable_count == sequence.count and (sequence.ending is None or sequence.ending_stored)
            for sequence in self.sequences
        )

    @property
    def wanted(self) -> bool:
        """Somebody waits for it, or it was told to go on alone (R6)."""
        return self.active and not self.ended and (self.spec.detach or bool(self.readers))

    def running(self) -> Iterator[Sequence]:
        """The choices that have not ended."""
        return (sequence for sequence in self.sequences if sequence.ending is None)

    def visible_count(self, sequence: Sequence) -> int:
        """How many tokens of a choice readers may see (R15)."""
        return sequence.durable_count if self.spec.committed else sequence.count

    def shows_ending(self, sequence: Sequence, *, cut_off: bool) -> bool:
        """Whether readers may see that a choice ended.

        Normally once the store has it, so that all readers ever see the same end; an ASYNC owner that is cut off from
        the store goes on without (R15).
        """
        if sequence.ending is None or self.visible_count(sequence) < sequence.count:
            return False
        return sequence.ending_stored or (cut_off and not self.spec.committed)

    def needs_grants(self, window: int) -> bool:
        """Half of a grant is used, and somebody wants more tokens (R6, R11)."""
        half = window // 2
        for sequence in self.sequences:
            used = sequence.granted - sequence.count <= half  # asked first: it is false for nearly every token
            if used and sequence.ending is None and sequence.choice in self.attempts:
                return self.wanted
        return False

    def renewed_grants(self, window: int) -> list[tuple[int, int]]:
        """All grants of which something is used, whole again, as (attempt, count); none while nobody wants tokens."""
        if not self.wanted:
            return []
        renewed = []
        for sequence in self.running():
            attempt = self.attempts.get(sequence.choice)
            if attempt is not None and sequence.granted - sequence.count < window:
                sequence.granted = sequence.count + window
                renewed.append((attempt, sequence.granted))
        return renewed


def known_ids(generation: Generation, sequence: Sequence) -> Items[int]:
    """The whole id sequence of a choice as far as it is known."""
    return generation.context + sequence.token_ids if sequence.token_ids else generation.context
