"""Decides what the next step computes: which tokens of which sequences, in which KV blocks.

There are no prefill or decode modes. A sequence has *known* tokens (its ids) and *computed* ones (their KV is there);
each step closes gaps within a budget of tokens and sequences, and where a gap is closed a token is drawn, which makes
a gap of one. Sequences that have blocks run before those that wait; within both, higher priority and then earlier
arrival come first. When blocks run out, the one that is last in that order loses its blocks, waits, and is computed
again from its known tokens; before it those lose theirs that have used up their grant (R11) and only wait for more.

Pure: a step is `next`, the computation by somebody else, then `close`; commands come between steps. Knows block numbers
and token ids; nothing of tensors, links, clocks, or how a token is drawn.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING

from services.common.errors import FieldViolation, InvalidLogits, InvalidRequest, OwnerChanged
from services.shard.blocks import BlockPool
from services.shard.outcome import Admitted, Ended, Load, Outcome, Tokens
from services.shard.sequence import Admission, Sequence

if TYPE_CHECKING:
    from services.common.sampling import Drawn, Row


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that are computed in one step.

    Attributes:
        start: position of the first of them, which is the number of tokens computed before.
        token_ids: the ids to compute, at least one.
        block_table: KV blocks of positions 0 .. start + len(token_ids) - 1; block i holds those from i * block_size on.
        draws: the last token of the chunk is the last known one: its logits are wanted.
    """

    start: int
    token_ids: list[int]
    block_table: list[int]
    draws: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """One step.

    Attributes:
        chunks: what is computed, at most one chunk per sequence.
        copies: (source, target) blocks: KV copied before anything is computed. In any order, for no block is in two.
        rows: what the draw needs to know of each chunk that draws, in their order.
        generations: whose chunk each is.
    """

    chunks: list[Chunk]
    copies: list[tuple[int, int]]
    rows: list[Row] = field(default_factory=list)
    generations: list[str] = field(default_factory=list)


class _Step:
    """A batch in the making, with what is left of its budget."""

    def __init__(self, tokens: int, sequences: int) -> None:
        self.tokens_left, self.sequences_left = tokens, sequences
        self.sequences: list[Sequence] = []
        self.chunks: list[Chunk] = []
        self.copies: list[tuple[int, int]] = []

    @property
    def full(self) -> bool:
        return self.tokens_left == 0 or self.sequences_left == 0

    def add(self, sequence: Sequence, size: int, block_size: int) -> None:
        """Lets a sequence that has its blocks compute its next `size` tokens."""
        start, end = sequence.computed, sequence.computed + size
        table = sequence.table[: -(-end // block_size)]
        token_ids = sequence.admission.token_ids
        self.chunks.append(Chunk(start, token_ids[start:end], table, draws=end == len(token_ids)))
        self.sequences.append(sequence)
        self.tokens_left -= size
        self.sequences_left -= 1


class Scheduler:
    """All sequences of a shard.

    Args:
        pool: the KV blocks; a whole context must fit.
        step_tokens: most tokens computed in a step.
        step_sequences: most sequences in a step.
        context_length: most tokens of a sequence; the one that reaches it ends.
    """

    def __init__(self, pool: BlockPool, *, step_tokens: int, step_sequences: int, context_length: int) -> None:
        if pool.blocks_for(context_length) > pool.block_count or min(step_tokens, step_sequences) < 1:
            raise ValueError(
                f"nothing can run: {pool.block_count} blocks for a context of {context_length} tokens, "
                f"{step_tokens} tokens of {step_sequences} sequences per step"
            )
        self._pool = pool
        self._step_tokens, self._step_sequences = step_tokens, step_sequences
        self._context_length = context_length
        self._sequences: dict[tuple[int, int], Sequence] = {}  # by link and attempt
        self._choices: dict[tuple[str, int], Sequence] = {}
        self._running: list[Sequence] = []  # those with blocks, by rank
        self._waiting: list[Sequence] = []  # those without, by rank
        self._scheduled: list[Sequence] = []  # in the order of the batch
        self._arrivals = 0
        self._steps = self._drawn_tokens = self._drawing_steps = 0
        self._computed_tokens = self._cached_tokens = self._preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether `next` would give a batch that is not empty."""
        return any(sequence.wants for sequence in self._sequences.values())

    @property
    def load(self) -> Load:
        """How busy it is."""
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            free_blocks=self._pool.available,
            steps=self._steps,
            drawn_tokens=self._drawn_tokens,
            drawing_steps=self._drawing_steps,
            computed_tokens=self._computed_tokens,
            cached_tokens=self._cached_tokens,
            preemptions=self._preemptions,
        )

    # Commands, between steps.

    def admit(self, admission: Admission) -> list[Ended]:
        """Takes a new admission, or refuses it; ends an older one of the same choice (R11).

        An equal epoch replaces too: the owner has lost its link and comes again before the loss was noticed here.
        """
        link, attempt = admission.link, admission.attempt
        leader = self._sequences.get((link, admission.fork_of)) if admission.fork_of is not None else None
        older = self._choices.get((admission.generation_id, admission.row.choice))
        if (link, attempt) in self._sequences:
            return [Ended(link, attempt, _invalid("attempt", "it is in use on this link"))]
        if leader is not None and not admission.has_prompt_of(leader.admission):
            return [Ended(link, attempt, _invalid("fork_of", "its tenant and ids before output_start must be equal"))]
        if older is not None and older.admission.epoch > admission.epoch:
            return [Ended(link, attempt, _owner_changed(older.admission.epoch))]
        ended = []
        if older is not None:
            self._end(older)
            ended.append(Ended(older.admission.link, older.admission.attempt, _owner_changed(admission.epoch)))
        self._arrivals += 1
        sequence = Sequence(admission, (-admission.priority, self._arrivals), admission.grant, leader)
        self._sequences[link, attempt] = self._choices[sequence.choice_key] = sequence
        insort(self._waiting, sequence, key=_rank)
        return ended

    def grant(self, link: int, attempt: int, count: int) -> None:
        """Lets a sequence run until it has `count` output tokens. Grants are absolute; a lower one changes nothing."""
        if sequence := self._sequences.get((link, attempt)):  # else it has just ended
            sequence.grant = max(sequence.grant, count)

    def release(self, link: int, attempt: int) -> None:
        """Ends a sequence; its blocks stay as prefix cache."""
        if sequence := self._sequences.get((link, attempt)):
            self._end(sequence)

    def release_link(self, link: int) -> None:
        """Ends all sequences of a link."""
        for sequence in [each for each in self._sequences.values() if each.admission.link == link]:
            self._end(sequence)

    # A step.

    def next(self) -> Batch:
        """Chooses the next batch. It is empty when nobody may draw, and otherwise never.

        Raises:
            AssertionError: a bug; waiting for it to go away would hang everybody.
        """
        self._steps += 1
        step = _Step(self._step_tokens, self._step_sequences)
        # After a preemption nobody new is let in: he would be the next to lose his blocks.
        if self._schedule_running(step):
            self._schedule_waiting(step)
        if not step.chunks and self.has_work:
            raise AssertionError(f"nobody can run: {self.load}")
        self._scheduled = step.sequences
        rows = [each.admission.row for each, chunk in zip(step.sequences, step.chunks, strict=True) if chunk.draws]
        return Batch(step.chunks, step.copies, rows, [each.admission.generation_id for each in step.sequences])

    def close(self, batch: Batch, drawn: Drawn) -> Outcome:
        """Books what was computed and drawn. Full blocks enter the prefix cache, finished sequences are gone.

        Args:
            batch: what `next` gave last.
            drawn: the tokens of `batch.rows`.
        """
        outcome = Outcome()
        draws = zip(drawn.token_ids, drawn.logprobs, drawn.top, strict=True)
        for sequence, chunk in zip(self._scheduled, batch.chunks, strict=True):
            link, attempt = sequence.admission.link, sequence.admission.attempt
            if not sequence.announced:
                sequence.announced = True
                outcome.admitted.append(Admitted(link, attempt, chunk.start))
            self._computed_tokens += len(chunk.token_ids)
            token_id, logprob, top = next(draws) if chunk.draws else (None, 0.0, [])
            if token_id == _INVALID:
                # What it computed may be to blame: nobody shall find it in the cache.
                self._pool.forget(sequence.table)
                self._end(sequence)
                outcome.ended.append(Ended(link, attempt, InvalidLogits("the model gave a logit that is no number")))
                continue
            self._advance(sequence, len(chunk.token_ids))
            if token_id is not None:
                self._append(sequence, token_id)
                outcome.tokens.setdefault(link, Tokens()).add(attempt, token_id, sequence.count, logprob, top)
        self._drawing_steps += bool(outcome.tokens)
        self._scheduled = []
        return outcome

    def check_integrity(self) -> None:
        """Counts everything again; for tests.

        Raises:
            AssertionError: the books are wrong; says where.
        """
        self._pool.check_integrity(sequence.table for sequence in self._sequences.values())
        everybody = sorted([*self._running, *self._waiting], key=_rank)
        if everybody != sorted(self._sequences.values(), key=_rank):
            raise AssertionError("a sequence is in two lists, or in none")
        for sequence in everybody:
            runs = sequence in self._running
            held = self._pool.blocks_for(sequence.computed)
            if sequence.ended or (runs and len(sequence.table) < held) or (not runs and sequence.table):
                raise AssertionError(f"{sequence.admission.attempt}: {sequence.computed} computed, {sequence.table}")
            if sequence.computed >= sequence.known or self._choices.get(sequence.choice_key) is not sequence:
                raise AssertionError(f"{sequence.admission.attempt}: computed too much, or not known by its choice")

    # Who runs.

    def _schedule_running(self, step: _Step) -> bool:
        """Schedules sequences that have blocks. Returns False when one of them lost its blocks."""
        preemptions = self._preemptions
        active = [sequence for sequence in self._running if sequence.wants]
        behind = sum(sequence.known - sequence.computed == 1 for sequence in active)
        for sequence in active:
            if step.full or not sequence.table:  # without a table: preempted for one in front of it, as all behind it
                break
            gap = sequence.known - sequence.computed
            behind -= gap == 1
            # A long prompt leaves one token to each of those behind it that need just one.
            size = min(gap, step.tokens_left - min(behind, step.sequences_left - 1))
            if size > 0 and self._grow(sequence):
                step.add(sequence, size, self._pool.block_size)
        return preemptions == self._preemptions

    def _schedule_waiting(self, step: _Step) -> None:
        """Lets waiting sequences in, in order, until one finds no room."""
        active = sum(sequence.wants for sequence in self._running)
        for sequence in tuple(self._waiting):
            if step.full or active >= self._step_sequences:
                break
            if not sequence.wants or self._awaits_leader(sequence):
                continue
            if not self._let_in(sequence, step, room=active):
                break
            active += 1
            step.add(sequence, min(sequence.known - sequence.computed, step.tokens_left), self._pool.block_size)

    def _awaits_leader(self, sequence: Sequence) -> bool:
        """Whether a sibling still waits for the one whose prompt it will share."""
        leader = sequence.leader
        if leader is None or leader.ended:
            return False
        if leader.computed < leader.admission.row.output_start:
            return leader.wants  # one that waits for a grant may never compute its prompt
        return leader.admitted_in == self._steps  # its blocks have their content when this step is done

    # Who gets blocks.

    def _let_in(self, sequence: Sequence, step: _Step, *, room: int) -> bool:
        """Gives a waiting sequence blocks for all its known tokens, those with content first.

        Args:
            sequence: who waits.
            step: gets the copies.
            room: blocks that must stay available, so that those who run do not take the new ones away at once.

        Returns:
            Whether there was enough room; if not, nothing has changed.
        """
        pool, needed = self._pool, self._pool.blocks_for(sequence.known)
        table, cached, partial = self._reuse(sequence)
        while pool.available < needed - len(table) + (partial and pool.is_shared(table[-1])) + room:
            # Those who only wait for a grant keep their blocks, unless otherwise nothing at all would run.
            idle = None if step.chunks else self._worst_idle()
            if idle is None:
                pool.release(table)
                return False
            self._preempt(idle)
        if partial and (copy := pool.own_last(table)):
            step.copies.append(copy)
        table += pool.take(needed - len(table))
        sequence.table, sequence.computed, sequence.admitted_in = table, cached, self._steps
        self._cached_tokens += cached
        sequence.leader = None
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=_rank)
        return True

    def _reuse(self, sequence: Sequence) -> tuple[list[int], int, bool]:
        """Takes references to blocks that have content for a sequence: the longest cached prefix or its leader's.

        At least the last known token is left to compute, since its logits are needed.

        Returns:
            The blocks, the number of tokens in them, and whether the last block is filled in part.
        """
        pool, admission = self._pool, sequence.admission
        pool.extend_keys(sequence.keys, admission.tenant, admission.token_ids)
        table = pool.match(sequence.keys, (sequence.known - 1) // pool.block_size)
        cached = len(table) * pool.block_size
        leader = sequence.leader
        if leader is not None and not leader.ended and leader.computed >= admission.row.output_start:
            shared = min(admission.row.output_start, sequence.known - 1)
            if shared > cached:
                pool.release(table)
                return pool.fork(leader.table, shared), shared, shared % pool.block_size > 0
        return table, cached, False

    def _grow(self, sequence: Sequence) -> bool:
        """Gives a running sequence blocks for all its known tokens; it may cost others theirs, or itself its own."""
        while (missing := self._pool.blocks_for(sequence.known) - len(sequence.table)) > self._pool.available:
            victim = self._worst_idle() or next(each for each in reversed(self._running) if each.wants)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.table += self._pool.take(missing)
        return True

    def _worst_idle(self) -> Sequence | None:
        return next((sequence for sequence in reversed(self._running) if not sequence.wants), None)

    def _preempt(self, sequence: Sequence) -> None:
        self._pool.release(sequence.table)
        sequence.table, sequence.computed = [], 0
        self._running.remove(sequence)
        insort(self._waiting, sequence, key=_rank)
        self._preemptions += 1

    # What became of it.

    def _advance(self, sequence: Sequence, size: int) -> None:
        """Books computed tokens and publishes the blocks that they filled."""
        pool, admission = self._pool, sequence.admission
        first_new = sequence.computed // pool.block_size
        sequence.computed += size
        filled = sequence.computed // pool.block_size
        if filled > first_new:
            pool.extend_keys(sequence.keys, admission.tenant, admission.token_ids)
            for index in range(first_new, filled):
                sequence.table[index] = pool.publish(sequence.keys[index], sequence.table[index])

    def _append(self, sequence: Sequence, token_id: int) -> None:
        """Adds a drawn token, and ends the sequence where the orchestrator ends it by the same rules (R3)."""
        admission = sequence.admission
        admission.token_ids.append(token_id)
        self._drawn_tokens += 1
        if (
            token_id in admission.row.stop_token_ids
            or sequence.count >= admission.max_count
            or sequence.known >= self._context_length
        ):
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        sequence.ended = True
        (self._running if sequence.table else self._waiting).remove(sequence)
        self._pool.release(sequence.table)
        sequence.table = []
        del self._sequences[sequence.admission.link, sequence.admission.attempt]
        del self._choices[sequence.choice_key]


_INVALID = -1
"""`sampling.Drawn` says so where nothing could be drawn."""

_rank = attrgetter("rank")


def _invalid(name: str, description: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: {description}", violations=[FieldViolation(name, description)])


def _owner_changed(epoch: int) -> OwnerChanged:
    return OwnerChanged("another admission of this choice took over", metadata={"epoch": str(epoch)})
