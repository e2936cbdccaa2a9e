"""The sequences that have KV blocks: how they come to theirs, share them, and lose them.

When blocks run out, those lose theirs first that have used up their grant (R11) and only wait for more, then those that
are last by rank: lower priority, and among equals the one that got its first blocks last. A rank is kept for life, so
of two sequences it is always the same one that yields, and the first one goes on until it ends.

Pure: knows sequences and block numbers; nothing of budgets, or whose turn it is.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from operator import attrgetter

from services.shard.blocks import BlockPool
from services.shard.sequence import Sequence

_rank = attrgetter("rank")


class Residents:
    """The sequences that have blocks.

    Args:
        pool: the blocks.
        on_preempt: told of each that has just lost its blocks to another one.

    Attributes:
        sequences: by rank.
        cached_tokens: tokens that were not computed because a block with their KV was found, since the start.
        preemptions: times that blocks were lost, since the start.
    """

    def __init__(self, pool: BlockPool, on_preempt: Callable[[Sequence], None]) -> None:
        self._pool, self._on_preempt = pool, on_preempt
        self.sequences: list[Sequence] = []
        self.cached_tokens = self.preemptions = self._let_in = 0

    def let_in(self, sequence: Sequence, *, room: int, evict: bool) -> list[tuple[int, int]] | None:
        """Gives a sequence blocks for all its known tokens, those with content first.

        Args:
            sequence: has none.
            room: blocks that must stay available, so that those who run do not take the new ones away at once.
            evict: whether those who wait for a grant lose their blocks for it.

        Returns:
            (source, target) blocks to copy; None when there was not enough room.
        """
        pool, needed = self._pool, self._pool.blocks_for(sequence.known)
        table, cached, partial = self._reuse(sequence)
        while pool.available < needed - len(table) + (partial and pool.is_shared(table[-1])) + room:
            idle = self._worst_idle() if evict else None
            if idle is None:
                pool.release(table)
                return None
            self._preempt(idle)
        copy = pool.own_last(table) if partial else None
        table += pool.take(needed - len(table))
        sequence.table, sequence.computed, sequence.leader = table, cached, None
        self.cached_tokens += cached
        if not sequence.seniority:
            self._let_in += 1
            sequence.seniority = self._let_in
        insort(self.sequences, sequence, key=_rank)
        return [copy] if copy else []

    def grow(self, sequence: Sequence) -> bool:
        """Gives a sequence blocks for all its known tokens; it may cost others theirs, or itself its own.

        Returns:
            Whether it still has blocks.
        """
        missing = self._pool.blocks_for(sequence.known) - len(sequence.table)
        while missing > self._pool.available:
            victim = self._worst_idle() or next(each for each in reversed(self.sequences) if each.wants)
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing:
            sequence.table += self._pool.take(missing)
        return True

    def advance(self, sequence: Sequence, size: int) -> None:
        """Books `size` computed tokens and publishes the blocks that they filled."""
        pool, admission = self._pool, sequence.admission
        first_new = sequence.computed // pool.block_size
        sequence.computed += size
        filled = sequence.computed // pool.block_size
        if filled > first_new:
            pool.extend_keys(sequence.keys, admission.tenant, admission.token_ids)
            for index in range(first_new, filled):
                sequence.table[index] = pool.publish(sequence.keys[index], sequence.table[index])

    def distrust(self, sequence: Sequence) -> None:
        """What it computed may be wrong: nobody shall find it in the prefix cache."""
        self._pool.forget(sequence.table)

    def leave(self, sequence: Sequence) -> None:
        """Takes the blocks of a sequence; what they hold stays as prefix cache."""
        self.sequences.remove(sequence)
        self._pool.release(sequence.table)
        sequence.table = []

    def check_integrity(self) -> None:
        """Counts everything again.

        Raises:
            AssertionError: the books are wrong; says where.
        """
        self._pool.check_integrity(sequence.table for sequence in self.sequences)
        ranks = [sequence.rank for sequence in self.sequences]
        if ranks != sorted(set(ranks)):
            raise AssertionError(f"not in the order of ranks, or twice: {ranks}")
        for sequence in self.sequences:
            if not self._pool.blocks_for(sequence.computed) <= len(sequence.table) >= 1:
                raise AssertionError(f"{sequence.admission.attempt}: {sequence.computed} computed, {sequence.table}")

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

    def _worst_idle(self) -> Sequence | None:
        return next((sequence for sequence in reversed(self.sequences) if not sequence.wants), None)

    def _preempt(self, sequence: Sequence) -> None:
        self.leave(sequence)
        sequence.computed = 0
        self.preemptions += 1
        self._on_preempt(sequence)
