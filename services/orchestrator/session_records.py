"""What the session store keeps, as plain values, and the ids by which it is found (R10, R13, R14, R17).

    session     a meta record: state, owner, epoch, the generations in order
    generation  a record of what it was opened as; its prompt ids; per choice one log of packed u32 and one terminal

Pure: knows neither how it is encoded and stored, nor gRPC. `spec`, `messages` and `error` are opaque bytes here.
"""

from __future__ import annotations

import base64
import enum
import hashlib
import hmac
import secrets
from dataclasses import dataclass, field

from services.common.errors import GenerationNotFound
from services.common.types import GENERATION_PATTERN, SESSION_PATTERN, FinishReason

IDLE, RUNNING, PARKED = "idle", "running", "parked"
"""States of a session; it has an active generation in the last two."""


@dataclass(frozen=True, slots=True)
class BranchPoint:
    """Where in the tree of a session a generation begins (R17).

    Attributes:
        generation: the parent; empty at the root.
        choice: of the parent.
        count: output tokens of that choice that come before.
    """

    generation: str = ""
    choice: int = 0
    count: int = 0


@dataclass(frozen=True, slots=True)
class Terminal:
    """How a choice ended (R1, R3); written once.

    Attributes:
        choice: index of the choice.
        reason: why.
        count: output tokens of the log.
        cut_bytes: bytes at the end of the log that are not part of the text.
        stop_token_id: what stopped it, with STOP_TOKEN.
        stop_string: what stopped it, with STOP_STRING.
        error: serialized google.rpc.Status, with ERROR.
        prompt_tokens: ids before the output.
        cached_tokens: of these, found in the KV cache.
    """

    choice: int
    reason: FinishReason
    count: int
    cut_bytes: int = 0
    stop_token_id: int | None = None
    stop_string: str | None = None
    error: bytes = b""
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NewGeneration:
    """A generation to open.

    Attributes:
        new_session: the session is opened with it; otherwise it must exist.
        prompt_ids: the ids that this generation adds, packed as little-endian u32.
        messages: what they came from, opaque.
        spec: parameters with the seed, opaque.
        choices: how many (n).
        position: length of the whole id sequence before the output.
        request_hash: a retry must have the same.
        detached: goes on without readers (R6); found again by `SessionStore.orphans`.
        deadline_ms: on the store's clock; 0 is none.
        labels: of a new session.
        expected_generation_count: refuse if the session has another number of generations.
    """

    tenant: str
    session: str
    generation: str
    new_session: bool
    parent: BranchPoint = BranchPoint()
    prompt_ids: bytes = b""
    messages: bytes = b""
    spec: bytes = b""
    choices: int = 1
    position: int = 0
    request_hash: bytes = b""
    detached: bool = False
    deadline_ms: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    expected_generation_count: int | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """The generation is in the store.

    Attributes:
        created: by this very call; False when an earlier call had made it.
        epoch: of the session's ownership now (R10).
        owner: process id of the session's owner; this process if `created`.
        address: where the owner listens.
    """

    created: bool
    epoch: int
    owner: str
    address: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """This process owns the generation now."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The claim failed: the owner is not the expected one, or there is nothing left to own (`finished`)."""

    owner: str
    address: str
    finished: bool


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """The meta record of a session.

    Attributes:
        state: IDLE, RUNNING or PARKED.
        owner: process id of the last owner.
        address: where it listens.
        epoch: of its ownership.
        generations: in the order of their opening.
        active: the generation that runs or is parked; empty when idle.
        labels: of the request that opened it.
        created_ms: on the store's clock.
        expires_ms: on the store's clock.
    """

    session: str
    state: str
    owner: str
    address: str
    epoch: int
    generations: list[str]
    active: str
    labels: dict[str, str]
    created_ms: int
    expires_ms: int


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """A generation with its log; fields as in `NewGeneration`.

    Attributes:
        prompt_ids: the ids that it added.
        terminals: of the choices that have ended.
        logs: output ids per choice.
    """

    session: str
    generation: str
    parent: BranchPoint
    prompt_ids: list[int]
    messages: bytes
    spec: bytes
    choices: int
    position: int
    request_hash: bytes
    created_ms: int
    deadline_ms: int
    detached: bool
    terminals: dict[int, Terminal]
    logs: list[list[int]]

    @property
    def finished(self) -> bool:
        """Every choice has ended."""
        return len(self.terminals) == self.choices

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that were in the KV cache; None while no choice has ended."""
        return max((terminal.cached_tokens for terminal in self.terminals.values()), default=None)


@dataclass(frozen=True, slots=True)
class Append:
    """Adds output ids, packed as little-endian u32, at `first_offset` of a choice's log."""

    tenant: str
    session: str
    generation: str
    choice: int
    epoch: int
    first_offset: int
    ids: bytes


@dataclass(frozen=True, slots=True)
class Finish:
    """Ends a choice whose log has `count` tokens, which is the terminal's count, too."""

    tenant: str
    session: str
    generation: str
    choice: int
    epoch: int
    terminal: Terminal
    count: int


@dataclass(frozen=True, slots=True)
class Park:
    """Says that a generation waits for a reader: who opens another one in its session ends it (R12)."""

    tenant: str
    session: str
    generation: str
    epoch: int


Operation = Append | Finish | Park


class ResultKind(enum.IntEnum):
    """What the store did with an operation."""

    OK = 0
    DUPLICATE = 1
    """Nothing: it was stored before, a retry."""
    FENCED = 2
    """Nothing: another process owns the session; or, of a park, it was claimed again since. Has `epoch` and `owner`."""
    CONFLICT = 3
    """Nothing: the log does not end where it should; has the stored `count`. Of an append: it is shorter."""
    DIVERGED = 4
    """Nothing: the log has other ids at these offsets; has the stored `count`."""
    FINISHED = 5
    """Nothing: the choice has ended; has the stored `terminal`."""
    MISSING = 6
    """Nothing: the store has no such choice."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one operation; which fields are set says `ResultKind`."""

    kind: ResultKind
    epoch: int = 0
    owner: str = ""
    count: int = 0
    terminal: Terminal | None = None

    @property
    def stored(self) -> bool:
        """The store has it."""
        return self.kind <= ResultKind.DUPLICATE


def join_generation_id(session: str, generation: str) -> str:
    """The public id of a generation (R14)."""
    return f"{session}.{generation}"


def split_generation_id(generation_id: str) -> tuple[str, str]:
    """Session and generation of a public id.

    Raises:
        GenerationNotFound: no generation can have this id.
    """
    session, _, generation = generation_id.partition(".")
    if not SESSION_PATTERN.fullmatch(session) or not GENERATION_PATTERN.fullmatch(generation):
        raise GenerationNotFound("no generation has such an id", metadata={"generation_id": generation_id})
    return session, generation


def random_ids() -> tuple[str, str]:
    """A session and a generation that nobody can guess."""
    return _encode_session(secrets.token_bytes(16)), secrets.token_hex(8)


def derived_ids(secret: bytes, tenant: str, request_id: str) -> tuple[str, str]:
    """The session and the generation of a request: the same for each retry, unguessable without the secret (R14)."""
    # The length keeps (tenant, request) pairs apart whose concatenations are equal.
    name = tenant.encode()
    digest = hmac.digest(secret, len(name).to_bytes(4, "big") + name + request_id.encode(), hashlib.sha256)
    return _encode_session(digest[:16]), digest[16:24].hex()


def _encode_session(identity: bytes) -> str:
    return base64.b32encode(identity).decode().rstrip("=").lower()
