"""One choice of a generation on a shard: what it was admitted with and how far it is.

Pure: knows token ids and block numbers; the scheduler decides what happens to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.common.sampling import Row


@dataclass(frozen=True, slots=True)
class Admission:
    """One choice of a generation, as it arrives. Valid: ids are below the vocabulary size, lengths fit the context.

    Attributes:
        link: who sent it and gets its results.
        attempt: its name on that link.
        generation_id: the generation; the choice stands in the row.
        epoch: of the generation's owner.
        tenant: keys the prefix cache.
        token_ids: all known ids. The scheduler appends what is drawn.
        row: how tokens are drawn; `row.token_ids` is `token_ids`, the same object.
        max_count: output tokens after which the choice ends.
        grant: output tokens after which it waits.
        fork_of: attempt of an earlier admission of this link with the same ids before `row.output_start`, or None.
        priority: higher first.
    """

    link: int
    attempt: int
    generation_id: str
    epoch: int
    tenant: str
    token_ids: list[int]
    row: Row
    max_count: int
    grant: int
    fork_of: int | None = None
    priority: int = 0

    def has_prompt_of(self, other: Admission) -> bool:
        """Whether the KV of the other's prompt is this one's too. It never crosses tenants."""
        start = self.row.output_start
        return (
            self.tenant == other.tenant
            and start == other.row.output_start
            and self.token_ids[:start] == other.token_ids[:start]
        )


@dataclass(eq=False, slots=True)
class Sequence:
    """An admission with its progress.

    Attributes:
        arrival: its number, in the order in which they came.
        grant: the admission's, raised since.
        leader: the sequence whose prompt it shares once that is computed; None when it stands alone.
        computed: number of leading tokens whose KV is in `table`.
        table: its KV blocks; empty while it waits.
        keys: of its full blocks, as far as they were needed.
        seniority: its number, in the order in which they got blocks for the first time; 0 before.
        admitted_in: number of the step in which it got its blocks.
        queued: it waits for turns of the prompts.
        announced: the link knows that it was admitted.
        ended: it is gone.
    """

    admission: Admission
    arrival: int
    grant: int
    leader: Sequence | None
    computed: int = 0
    table: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    seniority: int = 0
    admitted_in: int = 0
    queued: bool = False
    announced: bool = False
    ended: bool = False

    @property
    def known(self) -> int:
        """Number of known tokens."""
        return len(self.admission.token_ids)

    @property
    def gap(self) -> int:
        """Number of known tokens that are not computed; at least 1."""
        return len(self.admission.token_ids) - self.computed

    @property
    def rank(self) -> tuple[int, int]:
        """Order among those that have blocks: the last one loses them first. It never changes while it has some."""
        return -self.admission.priority, self.seniority

    @property
    def count(self) -> int:
        """Number of output tokens; those that it was admitted with count."""
        return len(self.admission.token_ids) - self.admission.row.output_start

    @property
    def wants(self) -> bool:
        """Whether it may draw; otherwise it waits for a grant."""
        return len(self.admission.token_ids) - self.admission.row.output_start < self.grant

    @property
    def choice_key(self) -> tuple[str, int]:
        """Generation and choice, of which one admission is alive."""
        return self.admission.generation_id, self.admission.row.choice
