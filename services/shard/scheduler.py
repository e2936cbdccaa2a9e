"""Decides what the next step computes: which tokens of which sequences, in which KV blocks.

There are no prefill or decode modes. A sequence has *known* tokens (its ids) and *computed* ones (their KV is there);
each step closes gaps within a budget of tokens and sequences, and where a gap is closed a token is drawn, which makes
a gap of one. Gaps of one come first, by rank (`residents.py`); then those of prompts and of whoever waits for blocks,
in fair turns (`fairness.py`), for as long as running sequences may be made to wait (`pacing.py`).

Pure: a step is `next`, the computation by somebody else, then `close`; commands come between steps. Knows block numbers
and token ids; nothing of tensors, links, clocks, or how a token is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.common.errors import FieldViolation, InvalidLogits, InvalidRequest, OwnerChanged
from services.shard.blocks import BlockPool
from services.shard.fairness import FairQueue
from services.shard.outcome import Admitted, Ended, Load, Outcome, Tokens
from services.shard.pacing import Allowance, Pacer
from services.shard.residents import Residents
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

    def add(self, sequence: Sequence, size: int, block_size: int) -> int:
        """Lets a sequence that has its blocks compute its next `size` tokens. Returns what it is charged for them."""
        token_ids, start = sequence.admission.token_ids, sequence.computed
        end = start + size
        draws = end == len(token_ids)
        self.chunks.append(Chunk(start, token_ids[start:end], sequence.table[: -(-end // block_size)], draws))
        self.sequences.append(sequence)
        self.tokens_left -= size
        self.sequences_left -= 1
        return size + draws


class Scheduler:
    """All sequences of a shard.

    Args:
        pool: the KV blocks; a whole context must fit.
        step_tokens: most tokens computed in a step.
        step_sequences: most sequences in a step.
        context_length: most tokens of a sequence; the one that reaches it ends.
        step_time: most seconds that prompts add to a step of running sequences, see `pacing.py`; 0 sets no limit.
    """

    def __init__(
        self, pool: BlockPool, *, step_tokens: int, step_sequences: int, context_length: int, step_time: float = 0.0
    ) -> None:
        if pool.blocks_for(context_length) > pool.block_count or min(step_tokens, step_sequences) < 1 or step_time < 0:
            raise ValueError(
                f"nothing can run: {pool.block_count} blocks for a context of {context_length} tokens, "
                f"{step_tokens} tokens of {step_sequences} sequences per step, {step_time} s for prompts"
            )
        self._pool = pool
        self._step_tokens, self._step_sequences = step_tokens, step_sequences
        self._context_length = context_length
        self._sequences: dict[tuple[int, int], Sequence] = {}  # by link and attempt
        self._choices: dict[tuple[str, int], Sequence] = {}
        self._residents = Residents(pool, self._enqueue)
        self._queue = FairQueue()
        self._pacer = Pacer(step_time)
        self._allowance: Allowance  # of the step that is computed, as the next one
        self._scheduled: list[Sequence] = []  # in the order of the batch
        self._arrivals = 0
        self._steps = self._drawn_tokens = self._drawing_steps = self._computed_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether `next` would give a batch that is not empty."""
        return len(self._queue) > 0 or any(sequence.wants for sequence in self._residents.sequences)

    @property
    def load(self) -> Load:
        """How busy it is."""
        running = len(self._residents.sequences)
        return Load(
            running=running,
            waiting=len(self._sequences) - running,
            free_blocks=self._pool.available,
            steps=self._steps,
            drawn_tokens=self._drawn_tokens,
            drawing_steps=self._drawing_steps,
            computed_tokens=self._computed_tokens,
            cached_tokens=self._residents.cached_tokens,
            preemptions=self._residents.preemptions,
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
        sequence = Sequence(admission, self._arrivals, admission.grant, leader)
        self._sequences[link, attempt] = self._choices[sequence.choice_key] = sequence
        self._enqueue(sequence)
        return ended

    def grant(self, link: int, attempt: int, count: int) -> None:
        """Lets a sequence run until it has `count` output tokens. Grants are absolute; a lower one changes nothing."""
        if sequence := self._sequences.get((link, attempt)):  # else it has just ended
            sequence.grant = max(sequence.grant, count)
            if not sequence.table and not sequence.queued:
                self._enqueue(sequence)

    def release(self, link: int, attempt: int) -> None:
        """Ends a sequence; its blocks are available at once, and stay as prefix cache until somebody takes them."""
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
        active = [sequence for sequence in self._residents.sequences if sequence.wants]
        undisturbed = self._schedule_running(step, active)
        self._allowance = self._pacer.allow(
            running=len(step.chunks), prompts=min(len(self._queue), self._step_sequences - len(step.chunks))
        )
        if self._queue:
            # After a preemption nobody new is let in: he would be the next to lose his blocks.
            self._schedule_prompts(step, active, letting_in=undisturbed)
        if not step.chunks and self.has_work:
            raise AssertionError(f"nobody can run: {self.load}")
        self._scheduled = step.sequences
        rows = [each.admission.row for each, chunk in zip(step.sequences, step.chunks, strict=True) if chunk.draws]
        return Batch(step.chunks, step.copies, rows, [each.admission.generation_id for each in step.sequences])

    def close(self, batch: Batch, drawn: Drawn, seconds: float = 0.0) -> Outcome:
        """Books what was computed and drawn. Full blocks enter the prefix cache, finished sequences are gone.

        Args:
            batch: what `next` gave last.
            drawn: the tokens of `batch.rows`.
            seconds: how long the step took; 0 when nobody knows.
        """
        self._pacer.learn(self._allowance, seconds)
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
                self._residents.distrust(sequence)
                self._end(sequence)
                outcome.ended.append(Ended(link, attempt, InvalidLogits("the model gave a logit that is no number")))
                continue
            self._residents.advance(sequence, len(chunk.token_ids))
            if token_id is not None:
                self._append(sequence, token_id)
                outcome.tokens.setdefault(link, Tokens()).add(attempt, token_id, sequence.count, logprob, top)
            if sequence.queued and sequence.gap == 1:
                self._queue.remove(sequence)
        self._drawing_steps += bool(outcome.tokens)
        self._scheduled = []
        return outcome

    def check_integrity(self) -> None:
        """Counts everything again; for tests.

        Raises:
            AssertionError: the books are wrong; says where.
        """
        self._residents.check_integrity()
        everybody, residents = set(self._sequences.values()), set(self._residents.sequences)
        if not everybody >= residents or everybody != set(self._choices.values()):
            raise AssertionError("a sequence that is gone has blocks, or is known by its choice")
        queued = set(self._queue)
        if len(queued) != len(self._queue) or queued != {each for each in everybody if each.queued}:
            raise AssertionError("somebody is in the queue twice, or is not who he says")
        for each in everybody:
            if each.ended or (each in residents) != bool(each.table) or each.gap < 1:
                raise AssertionError(f"{each.admission.attempt}: {each.computed} of {each.known} tokens, {each.table}")
            takes_turns = each.wants and (not each.table or each.gap > 1)
            if each.queued != takes_turns and each not in self._scheduled:  # these go with their step
                raise AssertionError(f"{each.admission.attempt}: in the queue: {each.queued}")

    # Who runs.

    def _schedule_running(self, step: _Step, active: list[Sequence]) -> bool:
        """Schedules the sequences that need one token. Returns False when somebody lost his blocks for them."""
        preemptions = self._residents.preemptions
        block_size, grow = self._pool.block_size, self._residents.grow
        running = [sequence for sequence in active if sequence.gap == 1]
        # A place is left for a prompt that has blocks, so that it goes on.
        most = min(self._step_tokens, self._step_sequences) - (len(running) < len(active))
        for sequence in running[:most]:
            if not sequence.table:  # preempted for one in front of it, as all behind it
                break
            if grow(sequence):
                charge = step.add(sequence, 1, block_size)
                if self._queue:
                    self._queue.charge(sequence, charge)
        return preemptions == self._residents.preemptions

    def _schedule_prompts(self, step: _Step, active: list[Sequence], *, letting_in: bool) -> None:
        """Gives turns to prompts, and lets waiting sequences in, until one finds no room."""
        count, allowance = len(active), self._allowance
        prompts = sum(sequence.queued and bool(sequence.table) for sequence in active)
        for sequence in self._queue.turns():
            letting_in = letting_in and count < self._step_sequences
            size = allowance.size(min(sequence.gap, step.tokens_left), sequence.computed)
            if step.full or not size or not (letting_in or prompts):
                break
            if sequence.table:
                prompts -= 1
            else:
                if not letting_in or self._awaits_leader(sequence):
                    continue
                letting_in = self._let_in(sequence, step, count)
                if not letting_in:
                    continue
                count += 1
                size = allowance.size(min(sequence.gap, step.tokens_left), sequence.computed) or 1
            allowance.spend(size, sequence.computed)
            self._queue.charge(sequence, step.add(sequence, size, self._pool.block_size))

    def _let_in(self, sequence: Sequence, step: _Step, active: int) -> bool:
        """Gives a waiting sequence its blocks, if there is room for it beside so many sequences that run."""
        # Those who only wait for a grant keep their blocks, unless otherwise nothing at all would run.
        copies = self._residents.let_in(sequence, room=active, evict=not active)
        if copies is None:
            return False
        step.copies += copies
        sequence.admitted_in = self._steps
        return True

    def _awaits_leader(self, sequence: Sequence) -> bool:
        """Whether a sibling still waits for the one whose prompt it will share."""
        leader = sequence.leader
        if leader is None or leader.ended:
            return False
        if leader.computed < leader.admission.row.output_start:
            return leader.wants  # one that waits for a grant may never compute its prompt
        return leader.admitted_in == self._steps  # its blocks have their content when this step is done

    # What became of it.

    def _enqueue(self, sequence: Sequence) -> None:
        """Lets a sequence without blocks wait for its turn, once it may draw."""
        if sequence.wants and not sequence.queued:
            self._queue.add(sequence)

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
        if sequence.queued:
            self._queue.remove(sequence)
        if sequence.table:
            self._residents.leave(sequence)
        del self._sequences[sequence.admission.link, sequence.admission.attempt]
        del self._choices[sequence.choice_key]


_INVALID = -1
"""`sampling.Drawn` says so where nothing could be drawn."""


def _invalid(name: str, description: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: {description}", violations=[FieldViolation(name, description)])


def _owner_changed(epoch: int) -> OwnerChanged:
    return OwnerChanged("another admission of this choice took over", metadata={"epoch": str(epoch)})
