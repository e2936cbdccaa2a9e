"""Every error that this library raises, by status family and reason.

    FermataError                       any other status
    ├── InvalidRequest                 INVALID_ARGUMENT     INVALID_FIELD
    │   ├── ContextLengthExceeded                           CONTEXT_LENGTH
    │   └── TemplateFailed                                  TEMPLATE_FAILED
    ├── NotFound                       NOT_FOUND
    │   ├── ModelNotFound                                   MODEL_NOT_FOUND
    │   ├── SessionNotFound                                 SESSION_NOT_FOUND
    │   └── GenerationNotFound                              GENERATION_NOT_FOUND
    ├── AlreadyExists                  ALREADY_EXISTS
    │   └── RequestIdReused                                 REQUEST_ID_REUSED
    ├── FailedPrecondition             FAILED_PRECONDITION
    │   ├── SessionBusy                                     SESSION_BUSY
    │   ├── PositionMismatch                                POSITION_MISMATCH
    │   ├── NeedFrom                                        NEED_FROM
    │   ├── OwnerElsewhere                                  OWNER_ELSEWHERE
    │   ├── FingerprintMismatch                             FINGERPRINT_MISMATCH
    │   └── NoChatTemplate                                  NO_CHAT_TEMPLATE
    ├── Aborted                        ABORTED
    │   ├── SessionChanged                                  SESSION_CHANGED
    │   └── OwnerChanged                                    OWNER_CHANGED
    ├── OutOfRange                     OUT_OF_RANGE
    │   └── CursorOutOfRange                                CURSOR_OUT_OF_RANGE
    ├── ResourceExhausted              RESOURCE_EXHAUSTED
    │   ├── SlowReader                                      SLOW_READER
    │   └── Overloaded                                      OVERLOADED
    ├── NotSupported                   UNIMPLEMENTED
    │   └── NotYetSupported                                 NOT_YET_SUPPORTED
    ├── Unavailable                    UNAVAILABLE          also: no server answers
    │   ├── SessionStoreUnavailable                         SESSION_STORE_UNAVAILABLE
    │   ├── NoOrchestrator                                  NO_ORCHESTRATOR
    │   ├── NoShard                                         NO_SHARD
    │   └── Draining                                        DRAINING
    ├── DataLoss                       DATA_LOSS
    │   ├── LogDiverged                                     LOG_DIVERGED; also found by the client's own hash
    │   └── LogLost                                         LOG_LOST
    ├── Internal                       INTERNAL             INTERNAL
    │   └── InvalidLogits                                   INVALID_LOGITS
    ├── DeadlineExceeded               DEADLINE_EXCEEDED    the caller's `timeout` passed
    └── Cancelled                      CANCELLED

A reason that this version does not know gives the class of its status. Knows gRPC statuses, not calls: who retries
what is decided in `resume.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import grpc
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "fermata"
"""`ErrorInfo.domain` of the server's errors."""

STATUS_DETAILS_KEY = "grpc-status-details-bin"


class FieldViolation(NamedTuple):
    """One field that was refused: its path in the request, and what would be accepted."""

    field: str
    description: str


class FermataError(Exception):
    """Base of all errors.

    Attributes:
        message: one sentence that the caller can act on.
        code: the gRPC status.
        reason: name of the `ErrorReason` without its prefix; empty when no service of Fermata spoke (a broken link,
            a deadline, a server of something else).
        metadata: machine-readable facts of the reason; see `errors.proto`.
        violations: the refused fields.
        retry_delay: seconds after which a retry makes sense, when the server said so.
        generation_id: the generation that was being read; empty when none was known. It can be resumed unless the
            reason speaks against it.
    """

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    own_reason: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Iterable[FieldViolation] = (),
        retry_delay: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = self.status if code is None else code
        self.reason = self.own_reason if reason is None else reason
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_delay = retry_delay
        self.generation_id = ""


class InvalidRequest(FermataError):
    """Fields are missing or out of range; see `violations`."""

    status, own_reason = grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"


class ContextLengthExceeded(InvalidRequest):
    """The prompt leaves no room for output. Metadata: prompt_tokens, context_length."""

    own_reason = "CONTEXT_LENGTH"


class TemplateFailed(InvalidRequest):
    """The model's chat template refused the conversation."""

    own_reason = "TEMPLATE_FAILED"


class NotFound(FermataError):
    """What was named does not exist."""

    status = grpc.StatusCode.NOT_FOUND


class ModelNotFound(NotFound):
    """No model of this name is served."""

    own_reason = "MODEL_NOT_FOUND"


class SessionNotFound(NotFound):
    """The session never existed or has expired."""

    own_reason = "SESSION_NOT_FOUND"


class GenerationNotFound(NotFound):
    """The generation never existed or has expired."""

    own_reason = "GENERATION_NOT_FOUND"


class AlreadyExists(FermataError):
    """What was to be made exists."""

    status = grpc.StatusCode.ALREADY_EXISTS


class RequestIdReused(AlreadyExists):
    """The request_id belongs to another request. Metadata: generation_id."""

    own_reason = "REQUEST_ID_REUSED"


class FailedPrecondition(FermataError):
    """The request is good, the state of the session or of the system is not."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class SessionBusy(FailedPrecondition):
    """The session runs another generation. Metadata: generation_id."""

    own_reason = "SESSION_BUSY"


class PositionMismatch(FailedPrecondition):
    """The session is not where the request expected it. Metadata: position."""

    own_reason = "POSITION_MISMATCH"


class NeedFrom(FailedPrecondition):
    """The log is shorter than the reader's cursor, and the reader has not kept the ids. Metadata: choice, count."""

    own_reason = "NEED_FROM"


class OwnerElsewhere(FailedPrecondition):
    """Between services only."""

    own_reason = "OWNER_ELSEWHERE"


class FingerprintMismatch(FailedPrecondition):
    """`exact` was asked for and no replica has the generation's fingerprint."""

    own_reason = "FINGERPRINT_MISMATCH"


class NoChatTemplate(FailedPrecondition):
    """The model has no chat template or no tokenizer."""

    own_reason = "NO_CHAT_TEMPLATE"


class Aborted(FermataError):
    """Something else came first; trying again makes sense."""

    status = grpc.StatusCode.ABORTED


class SessionChanged(Aborted):
    """The session went on since it was read."""

    own_reason = "SESSION_CHANGED"


class OwnerChanged(Aborted):
    """Another process owns the generation now."""

    own_reason = "OWNER_CHANGED"


class OutOfRange(FermataError):
    """A place behind the end was named."""

    status = grpc.StatusCode.OUT_OF_RANGE


class CursorOutOfRange(OutOfRange):
    """A cursor lies behind the end of a finished choice. Metadata: choice, count."""

    own_reason = "CURSOR_OUT_OF_RANGE"


class ResourceExhausted(FermataError):
    """A limit of the service."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class SlowReader(ResourceExhausted):
    """The reader took nothing for too long."""

    own_reason = "SLOW_READER"


class Overloaded(ResourceExhausted):
    """Too many generations are waiting; see `retry_delay`."""

    own_reason = "OVERLOADED"


class NotSupported(FermataError):
    """The server does not have this call."""

    status = grpc.StatusCode.UNIMPLEMENTED


class NotYetSupported(NotSupported):
    """Part of the contract that the server's version does not do."""

    own_reason = "NOT_YET_SUPPORTED"


class Unavailable(FermataError):
    """No server answers, or a link broke and the generation could not be resumed in time."""

    status = grpc.StatusCode.UNAVAILABLE


class SessionStoreUnavailable(Unavailable):
    """The session store does not answer."""

    own_reason = "SESSION_STORE_UNAVAILABLE"


class NoOrchestrator(Unavailable):
    """No orchestrator answers."""

    own_reason = "NO_ORCHESTRATOR"


class NoShard(Unavailable):
    """No shard answers."""

    own_reason = "NO_SHARD"


class Draining(Unavailable):
    """The replica is about to leave."""

    own_reason = "DRAINING"


class DataLoss(FermataError):
    """What was generated is lost or not what it was."""

    status = grpc.StatusCode.DATA_LOSS


class LogDiverged(DataLoss):
    """The tokens that were read are not those of the log. Metadata: choice, count."""

    own_reason = "LOG_DIVERGED"


class LogLost(DataLoss):
    """The store has the session but not all of its log. Metadata: session_id."""

    own_reason = "LOG_LOST"


class Internal(FermataError):
    """A failure inside the service; its log has the details. Metadata: error_id."""

    status, own_reason = grpc.StatusCode.INTERNAL, "INTERNAL"


class InvalidLogits(Internal):
    """The model produced a logit that is not a number for this sequence."""

    own_reason = "INVALID_LOGITS"


class DeadlineExceeded(FermataError):
    """The caller's `timeout` passed. The generation is not ended by it."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(FermataError):
    """The server or something on the way cancelled the call."""

    status = grpc.StatusCode.CANCELLED


def _tree(base: type[FermataError]) -> Iterator[type[FermataError]]:
    yield base
    for child in base.__subclasses__():
        yield from _tree(child)


BY_REASON: dict[str, type[FermataError]] = {kind.own_reason: kind for kind in _tree(FermataError) if kind.own_reason}
"""The class of each reason."""

BY_CODE: dict[grpc.StatusCode, type[FermataError]] = {kind.status: kind for kind in FermataError.__subclasses__()}
"""The class of a status without a known reason."""


def from_status(status: status_pb2.Status) -> FermataError:
    """The typed exception of a `google.rpc.Status`."""
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        for known in (info, bad_request, retry):
            if detail.Is(known.DESCRIPTOR):
                detail.Unpack(known)
    code = next((code for code in grpc.StatusCode if code.value[0] == status.code), grpc.StatusCode.UNKNOWN)
    reason = info.reason if info.domain == DOMAIN else ""
    return _error_class(code, reason)(
        status.message,
        code=code,
        reason=reason,
        metadata=info.metadata,
        violations=[FieldViolation(item.field, item.description) for item in bad_request.field_violations],
        retry_delay=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
    )


def from_rpc_error(error: grpc.RpcError) -> FermataError:
    """The typed exception of a failed call, sync or async."""
    metadata: Any = error.trailing_metadata()  # pairs of a key and text or bytes
    for key, value in metadata or ():
        if key == STATUS_DETAILS_KEY:
            return from_status(status_pb2.Status.FromString(value))
    code = error.code()
    return _error_class(code, "")(error.details() or code.name, code=code, reason="")


def _error_class(code: grpc.StatusCode, reason: str) -> type[FermataError]:
    return BY_REASON.get(reason) or BY_CODE.get(code, FermataError)
