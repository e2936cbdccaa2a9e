"""One choice of a generation: its log in memory, and everything that is derived from it.

Pure: the decisions of R1-R4 and R16 as plain Python. Knows ids, bytes and rules; neither shards, nor readers, nor the
session store. Any process that has the log can rebuild a `Sequence` by appending the same ids again.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids

from fermata.running_hash import EMPTY_HASH, extend_hash
from services.common.failpoints import planted
from services.common.timings import FirstMoments, StepMoments
from services.common.types import FinishReason, StopRules
from services.common.vocabulary import pending_bytes
from services.orchestrator.session_records import Terminal
from services.orchestrator.stops import StopMatch, StopMatcher

# More bytes than an incomplete character has, so that text before a cursor can be cut at a character.
_CONTEXT_BYTES = 16


class Sequence:
    """The output of one choice.

    Attributes:
        choice: its index.
        position: of the first output token in the whole id sequence.
        token_ids: the log; only ever appended to.
        ending: how it ended, None while it goes on.
        durable_count: tokens that the session store has acknowledged.
        ending_stored: the session store has the ending.
        granted: count up to which a shard may run (R11).
        cached_tokens: ids before the output that were in the KV cache at the first admission; None before it.
        steps: per token, the step that drew it (R25); None for those of the stored log.
        first: the way to its first token; None where it is not known.
        shown_ns: per token, when readers could see it, on this process's monotonic clock; only kept where that is
            later than its arrival.
        logprobs, top_logprobs: per token, NaN and empty where they are not known.
    """

    def __init__(
        self,
        choice: int,
        position: int,
        rules: StopRules,
        *,
        table: Ids[bytes],
        context_length: int,
    ) -> None:
        """`table` gives the bytes of each id; `context_length` bounds the whole id sequence."""
        self.choice = choice
        self.position = position
        self.token_ids: list[int] = []
        self.ending: Terminal | None = None
        self.durable_count = 0
        self.ending_stored = False
        self.granted = 0
        self.cached_tokens: int | None = None
        self.steps: list[StepMoments | None] = []
        self.first: FirstMoments | None = None
        self.admissions = 0
        self.shown_ns: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self._rules = rules
        self._context_length = context_length
        self._stop_token_ids = frozenset(rules.token_ids)
        self._table = table
        self._matcher = StopMatcher([stop.encode() for stop in rules.strings])
        self._hashes: list[bytes] = [EMPTY_HASH]
        self._held: list[int] = [0]
        self._late: StopMatch | None = None
        room = context_length - position
        self._limit_reason = FinishReason.CONTEXT_LENGTH
        self.max_count = room
        if rules.max_tokens and rules.max_tokens <= room:
            self.max_count, self._limit_reason = rules.max_tokens, FinishReason.MAX_TOKENS

    @property
    def count(self) -> int:
        """Number of output tokens."""
        return len(self.token_ids)

    def running_hash(self, count: int) -> bytes:
        """Hash over the first `count` tokens (R16)."""
        return self._hashes[count]

    def held(self, count: int) -> int:
        """Bytes at the end of the first `count` tokens that may still become a stop string (R3)."""
        return self._held[count]

    def pending(self, count: int) -> bytes:
        """Bytes of the first `count` tokens that the text before that cursor does not show (R2)."""
        held, tail, start = self._held[count], b"", count
        while start > 0 and len(tail) < held + _CONTEXT_BYTES:
            start -= 1
            tail = self._bytes(self.token_ids[start]) + tail
        return pending_bytes(tail, held)

    def append(
        self,
        token_id: int,
        step: StepMoments | None = None,
        *,
        logprob: float = float("nan"),
        top_logprobs: list[tuple[int, float]] | None = None,
    ) -> Terminal | None:
        """Adds one token and decides whether it ends the choice. Must not be called after the end."""
        assert self.ending is None
        piece = self._bytes(token_id)
        held_before = self._held[-1]
        self.token_ids.append(token_id)
        self._hashes.append(extend_hash(self._hashes[-1], token_id))
        self.steps.append(step)
        self.logprobs.append(logprob)
        self.top_logprobs.append(top_logprobs or [])
        looks = self.count > self._rules.min_tokens
        if looks and token_id in self._stop_token_ids:
            self._held.append(held_before + len(piece))
            cut = 0 if self._rules.include_stop_string else len(piece)
            self._end(FinishReason.STOP_TOKEN, cut_bytes=cut, stop_token_id=token_id)
        else:
            match = self._match(piece) if looks else None
            if match is not None:
                self._held.append(match.length + match.rest)
                cut = match.rest + (0 if self._rules.include_stop_string else match.length)
                stop = self._rules.strings[match.stop]
                self._end(FinishReason.STOP_STRING, cut_bytes=cut, stop_string=stop)
            else:
                self._held.append(self._matcher.held)
                if self.count >= self.max_count:
                    self._end(self._limit_reason)
        return self.ending

    def shown(self, now_ns: int) -> None:
        """Notes that readers can see what is durable from now on."""
        self.shown_ns.extend([now_ns] * (self.durable_count - len(self.shown_ns)))

    def visible_ns(self, offset: int) -> int:
        """When readers could see a token of a known step."""
        if offset < len(self.shown_ns):
            return self.shown_ns[offset]
        step = self.steps[offset]
        return step.arrived if step is not None else 0

    def finish(self, reason: FinishReason, error: bytes = b"") -> Terminal:
        """Ends the choice at its count for a reason that lies outside its tokens."""
        assert self.ending is None
        return self._end(reason, error=error)

    def restore(self, token_ids: Ids[int], ending: Terminal | None) -> None:
        """Rebuilds the choice from the stored log; all of it is durable. A stored ending is not decided again (R1)."""
        for token_id in token_ids:
            if self.ending is not None:
                break
            self.append(token_id)
        self.durable_count = self.count
        if ending is not None:
            self.ending, self.ending_stored, self.cached_tokens = ending, True, ending.cached_tokens

    def takes(self, token_ids: Ids[int]) -> bool:
        """Whether all of these can follow: the choice does not end before the last of them."""
        probe = Sequence(
            self.choice, self.position, self._rules, table=self._table, context_length=self._context_length
        )
        probe.restore(self.token_ids, None)
        for token_id in token_ids:
            if probe.ending is not None:
                return False
            probe.append(token_id)
        return True

    def accepts_tail(self, first_offset: int, tail: Ids[int], count: int, running_hash: bytes) -> list[int] | None:
        """What a reader's tail adds to the log, or None when both together do not give the reader's hash (R16)."""
        missing = list(tail[max(0, self.count - first_offset) :])
        if first_offset > self.count or self.count + len(missing) != count:
            return None
        current = self._hashes[-1]
        for token_id in missing:
            current = extend_hash(current, token_id)
        return missing if current == running_hash else None

    def _match(self, piece: bytes) -> StopMatch | None:
        if self._late is not None:
            return self._late
        match = self._matcher.feed(piece)
        if match is not None and planted("stop_seen_late"):
            self._late, match = match, None
        return match

    def _end(
        self,
        reason: FinishReason,
        *,
        cut_bytes: int = 0,
        stop_token_id: int | None = None,
        stop_string: str | None = None,
        error: bytes = b"",
    ) -> Terminal:
        self.ending = Terminal(
            choice=self.choice,
            reason=reason,
            count=self.count,
            cut_bytes=cut_bytes,
            stop_token_id=stop_token_id,
            stop_string=stop_string,
            error=error,
            prompt_tokens=self.position,
            cached_tokens=self.cached_tokens or 0,
        )
        return self.ending

    def _bytes(self, token_id: int) -> bytes:
        return self._table[token_id] if token_id < len(self._table) else b""
