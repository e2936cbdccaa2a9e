"""Every error that a caller can meet, with its gRPC status and its reason in the public contract.

    FermataError                      status               reason (fermata.v1.ErrorReason without its prefix)
    ├── InvalidRequest                INVALID_ARGUMENT     INVALID_FIELD (with field violations)
    ├── ContextLengthExceeded         INVALID_ARGUMENT     CONTEXT_LENGTH
    ├── TemplateFailed                INVALID_ARGUMENT     TEMPLATE_FAILED
    ├── ModelNotFound                 NOT_FOUND            MODEL_NOT_FOUND
    ├── SessionNotFound               NOT_FOUND            SESSION_NOT_FOUND
    ├── GenerationNotFound            NOT_FOUND            GENERATION_NOT_FOUND
    ├── NotYetSupported               UNIMPLEMENTED        NOT_YET_SUPPORTED
    ├── SessionBusy                   FAILED_PRECONDITION  SESSION_BUSY
    ├── PositionMismatch              FAILED_PRECONDITION  POSITION_MISMATCH
    ├── NeedFrom                      FAILED_PRECONDITION  NEED_FROM
    ├── OwnerElsewhere                FAILED_PRECONDITION  OWNER_ELSEWHERE
    ├── FingerprintMismatch           FAILED_PRECONDITION  FINGERPRINT_MISMATCH
    ├── NoChatTemplate                FAILED_PRECONDITION  NO_CHAT_TEMPLATE
    ├── SessionChanged                ABORTED              SESSION_CHANGED
    ├── OwnerChanged                  ABORTED              OWNER_CHANGED
    ├── RequestIdReused               ALREADY_EXISTS       REQUEST_ID_REUSED
    ├── LogDiverged                   DATA_LOSS            LOG_DIVERGED
    ├── LogLost                       DATA_LOSS            LOG_LOST
    ├── CursorOutOfRange              OUT_OF_RANGE         CURSOR_OUT_OF_RANGE
    ├── SlowReader                    RESOURCE_EXHAUSTED   SLOW_READER
    ├── Overloaded                    RESOURCE_EXHAUSTED   OVERLOADED (with a retry delay)
    ├── SessionStoreUnavailable       UNAVAILABLE          SESSION_STORE_UNAVAILABLE (with a retry delay)
    ├── NoOrchestrator                UNAVAILABLE          NO_ORCHESTRATOR (with a retry delay)
    ├── NoShard                       UNAVAILABLE          NO_SHARD (with a retry delay)
    ├── Draining                      UNAVAILABLE          DRAINING
    ├── InvalidLogits                 INTERNAL             INVALID_LOGITS
    └── InternalError                 INTERNAL             INTERNAL

Pure values: `common/rpc.py` turns them into `google.rpc.Status` and back; `fermata/errors.py` is the client's side.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

DOMAIN = "fermata"
"""`ErrorInfo.domain` of every error."""


class FieldViolation(NamedTuple):
    """One field that was refused: its path in the request, and what would be accepted."""

    field: str
    description: str


class FermataError(Exception):
    """Base of all errors with a status.

    Attributes:
        message: one sentence that the caller can act on.
        metadata: machine-readable facts, strings both.
        violations: the refused fields.
        retry_delay: seconds after which a retry makes sense; None when it does not by itself.
    """

    status: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        metadata: dict[str, str] | None = None,
        violations: list[FieldViolation] | None = None,
        retry_delay: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = metadata or {}
        self.violations = violations or []
        self.retry_delay = retry_delay


class InvalidRequest(FermataError):
    """Fields are missing or out of range."""

    status, reason = "INVALID_ARGUMENT", "INVALID_FIELD"


class ContextLengthExceeded(FermataError):
    """The prompt leaves no room for output."""

    status, reason = "INVALID_ARGUMENT", "CONTEXT_LENGTH"


class TemplateFailed(FermataError):
    """The model's chat template refused the conversation."""

    status, reason = "INVALID_ARGUMENT", "TEMPLATE_FAILED"


class ModelNotFound(FermataError):
    """No model of this name is served."""

    status, reason = "NOT_FOUND", "MODEL_NOT_FOUND"


class SessionNotFound(FermataError):
    """The session never existed, has expired, or is another tenant's."""

    status, reason = "NOT_FOUND", "SESSION_NOT_FOUND"


class GenerationNotFound(FermataError):
    """The generation never existed, has expired, or is another tenant's."""

    status, reason = "NOT_FOUND", "GENERATION_NOT_FOUND"


class NotYetSupported(FermataError):
    """Part of the contract that this version does not do."""

    status, reason = "UNIMPLEMENTED", "NOT_YET_SUPPORTED"


class SessionBusy(FermataError):
    """The session runs another generation (R12)."""

    status, reason = "FAILED_PRECONDITION", "SESSION_BUSY"


class PositionMismatch(FermataError):
    """The session is not where the request expected it."""

    status, reason = "FAILED_PRECONDITION", "POSITION_MISMATCH"


class NeedFrom(FermataError):
    """The log is shorter than the reader's cursor; tails are needed (R16)."""

    status, reason = "FAILED_PRECONDITION", "NEED_FROM"


class OwnerElsewhere(FermataError):
    """Another living process owns the generation (R9)."""

    status, reason = "FAILED_PRECONDITION", "OWNER_ELSEWHERE"


class FingerprintMismatch(FermataError):
    """`exact` was asked for and no shard has the generation's fingerprint (R20)."""

    status, reason = "FAILED_PRECONDITION", "FINGERPRINT_MISMATCH"


class NoChatTemplate(FermataError):
    """The model has no template."""

    status, reason = "FAILED_PRECONDITION", "NO_CHAT_TEMPLATE"


class SessionChanged(FermataError):
    """The session went on since it was read."""

    status, reason = "ABORTED", "SESSION_CHANGED"


class OwnerChanged(FermataError):
    """Another process owns the generation now (R10)."""

    status, reason = "ABORTED", "OWNER_CHANGED"


class RequestIdReused(FermataError):
    """The request_id belongs to another request (R14)."""

    status, reason = "ALREADY_EXISTS", "REQUEST_ID_REUSED"


class LogDiverged(FermataError):
    """The reader's tokens are not those of the log (R15)."""

    status, reason = "DATA_LOSS", "LOG_DIVERGED"


class LogLost(FermataError):
    """The store has the session but not all of its log."""

    status, reason = "DATA_LOSS", "LOG_LOST"


class CursorOutOfRange(FermataError):
    """A cursor lies behind the end of a finished choice."""

    status, reason = "OUT_OF_RANGE", "CURSOR_OUT_OF_RANGE"


class SlowReader(FermataError):
    """The reader took nothing for too long (R5)."""

    status, reason = "RESOURCE_EXHAUSTED", "SLOW_READER"


class Overloaded(FermataError):
    """Too much waits already."""

    status, reason = "RESOURCE_EXHAUSTED", "OVERLOADED"


class SessionStoreUnavailable(FermataError):
    """Redis does not answer."""

    status, reason = "UNAVAILABLE", "SESSION_STORE_UNAVAILABLE"


class NoOrchestrator(FermataError):
    """No orchestrator answers."""

    status, reason = "UNAVAILABLE", "NO_ORCHESTRATOR"


class NoShard(FermataError):
    """No shard answers."""

    status, reason = "UNAVAILABLE", "NO_SHARD"


class Draining(FermataError):
    """The replica is about to leave."""

    status, reason = "UNAVAILABLE", "DRAINING"


class InvalidLogits(FermataError):
    """A logit of this sequence is not a number (R22)."""

    status, reason = "INTERNAL", "INVALID_LOGITS"


class InternalError(FermataError):
    """A bug; the log of the service has the details."""

    status, reason = "INTERNAL", "INTERNAL"


def _tree(base: type[FermataError]) -> list[type[FermataError]]:
    return [base, *(kind for child in base.__subclasses__() for kind in _tree(child))]


BY_REASON: dict[str, type[FermataError]] = {kind.reason: kind for kind in _tree(FermataError)}
"""The class of each reason, to turn a received status back into the exception."""
