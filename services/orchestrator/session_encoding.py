"""Between values and what the session store's scripts take and reply.

Pure: bytes in, values out. The names of fields are those of `session_scripts.py`. Does not know how the bytes travel.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

from services.common.errors import (
    FermataError,
    FieldViolation,
    GenerationNotFound,
    InvalidRequest,
    LogLost,
    NotYetSupported,
    RequestIdReused,
    SessionBusy,
    SessionChanged,
    SessionNotFound,
    SessionStoreUnavailable,
)
from services.common.types import GENERATION_PATTERN, RECORD_VERSION, SESSION_PATTERN, FinishReason, unpack_ids
from services.orchestrator.session_records import (
    Append,
    BranchPoint,
    Finish,
    GenerationRecord,
    NewGeneration,
    Operation,
    Result,
    ResultKind,
    SessionRecord,
    Terminal,
    join_generation_id,
)
from services.orchestrator.session_scripts import INDEX_PREFIX

RETRY_DELAY = 1.0
"""Seconds after which a caller may try again when the store is unavailable."""

_GENERATION_LENGTH = 16
_STORED = (Result(ResultKind.OK), Result(ResultKind.DUPLICATE))
_MISSING = Result(ResultKind.MISSING)


@lru_cache(maxsize=8192)
def session_prefix(tenant: str, session: str) -> str:
    """What the keys of a session begin with; its braces put them all into one slot (R13).

    Raises:
        SessionNotFound: no session can have this id.
    """
    if not SESSION_PATTERN.fullmatch(session):
        raise SessionNotFound("no session has such an id", metadata={"session_id": session})
    return f"f:{{{quote_tenant(tenant)}:{session}}}:"


def quote_tenant(tenant: str) -> str:
    """A tenant as part of a key: without colons and braces, so that no two tenants share a key."""
    return quote(tenant, safe="")


def check_generation(session: str, generation: str) -> None:
    """Refuses what cannot be part of a key.

    Raises:
        GenerationNotFound: no generation can have this id.
    """
    if not GENERATION_PATTERN.fullmatch(generation):
        raise GenerationNotFound(
            "no generation has such an id", metadata={"generation_id": join_generation_id(session, generation)}
        )


def encode_terminal(terminal: Terminal) -> bytes:
    """A terminal as it is stored: one encoding for equal terminals, so that a retry is known by its bytes.

    The choice is not part of it, and neither is what is zero, count and prompt tokens apart.
    """
    fields: dict[str, int | str] = {
        "reason": int(terminal.reason),
        "count": terminal.count,
        "prompt_tokens": terminal.prompt_tokens,
    }
    if terminal.cut_bytes:
        fields["cut_bytes"] = terminal.cut_bytes
    if terminal.cached_tokens:
        fields["cached_tokens"] = terminal.cached_tokens
    if terminal.stop_token_id is not None:
        fields["stop_token_id"] = terminal.stop_token_id
    if terminal.stop_string is not None:
        fields["stop_string"] = terminal.stop_string
    if terminal.error:
        fields["error"] = base64.b64encode(terminal.error).decode()
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def decode_terminal(choice: int, stored: bytes) -> Terminal:
    """Inverse of `encode_terminal`."""
    fields = json.loads(stored)
    return Terminal(
        choice=choice,
        reason=FinishReason(fields["reason"]),
        count=fields["count"],
        cut_bytes=fields.get("cut_bytes", 0),
        stop_token_id=fields.get("stop_token_id"),
        stop_string=fields.get("stop_string"),
        error=base64.b64decode(fields.get("error", "")),
        prompt_tokens=fields["prompt_tokens"],
        cached_tokens=fields.get("cached_tokens", 0),
    )


def open_arguments(
    new: NewGeneration, *, secret: bytes, owner: str, address: str, ttl_ms: int, nonce: bytes
) -> list[str | bytes | int]:
    """Arguments of OPEN."""
    parent, expected = new.parent, new.expected_generation_count
    named: list[str | bytes | int] = [
        *(secret, new.generation, new.session, int(new.new_session), "" if expected is None else expected),
        *(owner, address, ttl_ms, new.request_hash, nonce, parent.generation, parent.choice, parent.count),
        *(new.choices, int(new.detached), new.prompt_ids, json.dumps(new.labels)),
    ]
    fields: dict[str, str | bytes | int] = {
        "parent": f"{parent.generation}:{parent.choice}:{parent.count}",
        "messages": new.messages,
        "spec": new.spec,
        "position": new.position,
        "deadline": new.deadline_ms,
    }
    return named + [part for item in fields.items() for part in item]


def write_arguments(
    owner: str, *, check_owner: bool, operations: Sequence[Operation]
) -> tuple[list[str], list[str | bytes | int]]:
    """Keys and arguments of WRITE.

    Raises:
        ValueError: ids are no whole number of tokens, or the counts of an ending differ.
    """
    keys: list[str] = []
    arguments: list[str | bytes | int] = [owner, int(check_owner)]
    for item in operations:
        keys.append(session_prefix(item.tenant, item.session) + "m")
        if type(item) is Append:
            if len(item.ids) % 4:
                raise ValueError(f"{len(item.ids)} bytes are no packed ids")
            arguments += (f"A{item.generation}:{item.choice}:{item.epoch}:{item.first_offset}", item.ids)
        elif type(item) is Finish:
            if item.count != item.terminal.count:
                raise ValueError(f"the log has {item.count} tokens, its terminal {item.terminal.count}")
            ending = encode_terminal(item.terminal)
            arguments += (f"F{item.generation}:{item.choice}:{item.epoch}:{item.count}", ending)
        else:
            arguments += (f"P{item.generation}:0:{item.epoch}:0", b"")
    return keys, arguments


def read_results(reply: Sequence[int | Sequence[Any]], operations: Sequence[Operation]) -> list[Result]:
    """What WRITE replied, by operation."""
    return [_read_result(entry, item) for entry, item in zip(reply, operations, strict=True)]


def _read_result(entry: int | Sequence[Any], operation: Operation) -> Result:
    if isinstance(entry, int):
        return _STORED[entry] if entry < len(_STORED) else _MISSING
    kind, value = ResultKind(entry[0]), entry[1]
    if kind is ResultKind.FENCED:
        return Result(kind, epoch=value, owner=entry[2].decode())
    if kind is ResultKind.FINISHED:
        return Result(kind, terminal=decode_terminal(getattr(operation, "choice", 0), value))
    return Result(kind, count=value)


def refusal_to_open(verdict: bytes, facts: Sequence[bytes], new: NewGeneration) -> FermataError:
    """Why OPEN did nothing."""
    session, generation_id = {"session_id": new.session}, join_generation_id(new.session, new.generation)
    match verdict:
        case b"BUSY":
            busy = join_generation_id(new.session, facts[0].decode())
            return SessionBusy("another generation of this session runs", metadata={"generation_id": busy})
        case b"CHANGED":
            return SessionChanged("the session changed since it was read; try again", metadata=session)
        case b"MISSING":
            return SessionNotFound("the session does not exist or has expired", metadata=session)
        case b"PARENT":
            parent = join_generation_id(new.session, new.parent.generation)
            return GenerationNotFound("the session has no such generation", metadata={"generation_id": parent})
        case b"REUSED":
            return RequestIdReused(
                "the request_id belongs to another request", metadata={"generation_id": generation_id}
            )
        case _:
            return other_version(new.session)


def other_version(session: str) -> NotYetSupported:
    """A record of another version (R13) is refused."""
    return NotYetSupported("the session was stored by another version of the system", metadata={"session_id": session})


def read_session(session: str, fields: Mapping[bytes, bytes]) -> SessionRecord:
    """A session from the fields of its meta.

    Raises:
        SessionNotFound: there are none.
        NotYetSupported: another version of the system wrote it.
    """
    if not fields:
        raise SessionNotFound("the session does not exist or has expired", metadata={"session_id": session})
    _check_version(session, fields[b"v"])
    labels = json.loads(fields[b"labels"])
    return SessionRecord(
        session=session,
        state=fields[b"state"].decode(),
        owner=fields[b"owner"].decode(),
        address=fields[b"address"].decode(),
        epoch=int(fields[b"epoch"]),
        generations=split_generations(fields[b"generations"]),
        active=fields[b"active"].decode(),
        labels={str(name): str(value) for name, value in labels.items()},
        created_ms=int(fields[b"created"]),
        expires_ms=int(fields[b"expires"]),
    )


def read_page(page: Sequence[tuple[bytes, Sequence[bytes]]]) -> list[SessionRecord]:
    """Sessions as LIST replied, without those that another version of the system wrote."""
    sessions = [(session.decode(), pairs(flat)) for session, flat in page]
    return [read_session(session, fields) for session, fields in sessions if int(fields[b"v"]) == RECORD_VERSION]


def read_generations(session: str, generations: Sequence[str], reply: Sequence[Any]) -> list[GenerationRecord]:
    """Generations as LOAD replied.

    Raises:
        GenerationNotFound: the session does not have one of them, or does not exist.
        LogLost: the session has it, but not all of its record, prompt or logs.
        NotYetSupported: another version of the system wrote it.
    """
    version, stored, *entries = reply
    known = frozenset(split_generations(stored or b""))
    records = []
    for generation, (flat, prompt, *logs) in zip(generations, entries, strict=True):
        if generation not in known:
            raise GenerationNotFound(
                "the generation does not exist or has expired",
                metadata={"generation_id": join_generation_id(session, generation)},
            )
        _check_version(session, version)
        records.append(_read_generation(session, generation, pairs(flat), prompt, logs))
    return records


def _read_generation(
    session: str, generation: str, fields: Mapping[bytes, bytes], prompt: bytes | None, logs: Sequence[bytes | None]
) -> GenerationRecord:
    """One generation; all of its keys are made with it, so what is missing was lost."""
    if not fields or prompt is None or any(log is None or len(log) % 4 for log in logs):
        raise _lost(session)
    choices = int(fields[b"choices"])
    endings = {choice: fields.get(b"t%d" % choice) for choice in range(choices)}
    terminals = {choice: decode_terminal(choice, ending) for choice, ending in endings.items() if ending is not None}
    token_ids = [unpack_ids(log) for log in logs if log is not None]
    if any(len(token_ids[choice]) != terminal.count for choice, terminal in terminals.items()):
        raise _lost(session)
    parent, choice, count = fields[b"parent"].decode().split(":")
    return GenerationRecord(
        session=session,
        generation=generation,
        parent=BranchPoint(parent, int(choice), int(count)),
        prompt_ids=unpack_ids(prompt),
        messages=fields[b"messages"],
        spec=fields[b"spec"],
        choices=choices,
        position=int(fields[b"position"]),
        request_hash=fields[b"request_hash"],
        created_ms=int(fields[b"created"]),
        deadline_ms=int(fields[b"deadline"]),
        detached=fields[b"detached"] == b"1",
        terminals=terminals,
        logs=token_ids,
    )


def _check_version(session: str, version: bytes) -> None:
    """Refuses records of another version (R13).

    Raises:
        NotYetSupported: it is one.
    """
    if int(version) != RECORD_VERSION:
        raise other_version(session)


def _lost(session: str) -> LogLost:
    return LogLost("the session store lost a part of this session", metadata={"session_id": session})


def pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """Fields of a hash from the flat list in which a script replies with it."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def split_generations(stored: bytes) -> list[str]:
    """Generations of a meta: fixed width, without separators."""
    text = stored.decode()
    return [text[first : first + _GENERATION_LENGTH] for first in range(0, len(text), _GENERATION_LENGTH)]


def encode_page_token(time: bytes, session: bytes) -> str:
    """Where a page ended."""
    return base64.urlsafe_b64encode(time + b":" + session).decode()


def decode_page_token(token: str) -> tuple[str, str]:
    """Inverse of `encode_page_token`; an empty token gives empty strings.

    Raises:
        InvalidRequest: it is none.
    """
    if not token:
        return "", ""
    try:
        time, separator, session = base64.urlsafe_b64decode(token).decode().partition(":")
    except (binascii.Error, ValueError):
        time, separator, session = "", "", ""
    if not separator or not (time.isascii() and time.isdigit()) or not SESSION_PATTERN.fullmatch(session):
        raise InvalidRequest(
            "the page token is not one of ours",
            violations=[FieldViolation("page_token", "must be the next_page_token of the previous page, unchanged")],
        )
    return time, session


def split_member(member: bytes) -> tuple[str, str, str]:
    """Tenant, session and generation of a member of the detached index."""
    tag, _, generation = member.decode().rpartition(".")
    tenant, _, session = tag.partition(":")
    return unquote(tenant), session, generation


def index_key(tenant: str) -> str:
    """Key of the index of a tenant's sessions."""
    return INDEX_PREFIX + quote_tenant(tenant)


def unavailable(message: str) -> SessionStoreUnavailable:
    """The error of a store that cannot do something now; a retry may succeed."""
    return SessionStoreUnavailable(message, retry_delay=RETRY_DELAY)
