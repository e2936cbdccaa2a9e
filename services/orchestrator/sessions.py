"""The session store: where logs outlive processes (R1, R8-R16).

The only module that speaks to Redis or Valkey. Each change is one script, hence one atomic step, and may be retried:
an append that is stored already is a duplicate, not a second append. Knows records and ids; what a generation does, who
reads it, and what a refusal means for them is its caller's business.

Never hangs: a call makes up to three attempts of half a second each and gives up within two seconds; then the store
counts as unavailable. A call is never cancelled once it was sent, for that would cost the connection: a caller that is
cancelled or gives up leaves it behind, so it may still be done later.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    NoScriptError,
    RedisError,
    ResponseError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from services.common import failpoints
from services.common.errors import (
    FermataError,
    GenerationNotFound,
    InternalError,
    Overloaded,
    SessionStoreUnavailable,
)
from services.orchestrator import session_encoding as encoding
from services.orchestrator import session_indexes as indexes
from services.orchestrator import session_scripts as scripts
from services.orchestrator.session_records import (
    Append,
    Claimed,
    GenerationRecord,
    NewGeneration,
    Opened,
    Operation,
    Refused,
    Result,
    ResultKind,
    SessionRecord,
    derived_ids,
    join_generation_id,
    random_ids,
)
from services.orchestrator.session_scripts import Script

log = logging.getLogger(__name__)

OLDEST_VERSION = (6, 2)
"""Of Redis; Valkey says which Redis it is compatible with."""
LEASE_SECONDS = 5.0
"""A process counts as dead this long after its last `renew_lease` (R9)."""

_GIVE_UP_SECONDS = 1.9
"""Of a call, the time that it waits for a connection included."""
_ATTEMPT_SECONDS = 0.5
_ATTEMPTS = 3
_BACKOFF = ExponentialWithJitterBackoff(base=0.01, cap=0.2)
_LOAD_AT_ONCE = 32
"""Generations per call of LOAD: a script holds up everybody else."""
_MOST_PAGE_ENTRIES = 1000
# What a server says when it cannot now, inside of the errors of scripts, too.
_OUT_OF_MEMORY = re.compile(r"\bOOM\b|used memory > 'maxmemory'")
_UNABLE = re.compile(
    r"\b(READONLY|LOADING|MISCONF|MASTERDOWN|CLUSTERDOWN|NOREPLICAS|TRYAGAIN|BUSY|NOPERM|NOAUTH|WRONGPASS)\b"
    r"|read only replica|no permissions"
)

T = TypeVar("T")


class SessionStore:
    """A process's view of the store.

    Args:
        url: redis://, rediss:// or unix://.
        process_id: of this process, made anew at each start (R9).
        address: where the process listens; others find it in the records.
        ttl: seconds that an unused session is kept.

    Attributes:
        calls: calls that were made.
        flushes: successful calls of `write`.
        appended_tokens: tokens that the store acknowledged.

    Raises:
        ValueError: the URL is none.

    Every method raises SessionStoreUnavailable (with a retry delay) when the store does not answer within two seconds
    or cannot do the work now.
    """

    def __init__(self, url: str, *, process_id: str, address: str, ttl: float) -> None:
        self.calls = self.flushes = self.appended_tokens = 0
        self._process_id = process_id
        self._address = address
        self._ttl_ms = max(1, round(ttl * 1000))
        # The writer has a connection of its own: a long read never holds up the log.
        self._reader = _client(url, connections=8)
        self._writer = _client(url, connections=1)
        self._secret = b""
        self._pending: set[asyncio.Task[Any]] = set()

    async def connect(self) -> None:
        """Checks that the store is there and is one that works, and prepares it.

        Raises:
            SessionStoreUnavailable: it is not, with the reason.
        """
        facts: dict[str, Any] = await self._command(self._reader, "INFO")
        version = str(facts.get("redis_version", "0"))
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_VERSION:
            raise SessionStoreUnavailable(f"the session store is Redis {version}; 6.2 or a later one is needed")
        if "cluster" in (facts.get("redis_mode"), facts.get("server_mode")):
            raise SessionStoreUnavailable("the session store is a cluster; a single primary is needed")
        if facts.get("maxmemory") and facts.get("maxmemory_policy") != "noeviction":
            log.warning("the session store may evict sessions: its maxmemory-policy should be noeviction")
        for script in (scripts.OPEN, scripts.CLAIM, scripts.WRITE, scripts.LOAD, indexes.LIST, indexes.ORPHANS):
            await self._command(self._reader, "SCRIPT", "LOAD", script.source)
        await self._load_secret()

    async def close(self) -> None:
        """Waits for calls under way, then closes the connections."""
        await asyncio.gather(*self._pending, return_exceptions=True)
        await self._reader.aclose()
        await self._writer.aclose()

    async def ids_for(self, tenant: str, request_id: str, session_id: str) -> tuple[str, str]:
        """Session and generation of a request (R14): the same for each retry, or random without a request_id.

        Args:
            session_id: the session to go on with; empty for a new one.
        """
        if request_id:
            session, generation = derived_ids(self._secret or await self._load_secret(), tenant, request_id)
        else:
            session, generation = random_ids()
        return session_id or session, generation

    async def open(self, new: NewGeneration) -> Opened:
        """Makes a generation durable, and this process the owner of its session.

        Idempotent by the generation's id. A parked generation of the session is finished first, as CANCELLED at what
        is stored of it (R12).

        Raises:
            SessionBusy: another generation of the session runs (metadata: generation_id).
            SessionChanged: the session has another number of generations, or the parent lost tokens that it had.
            SessionNotFound: there is no such session.
            GenerationNotFound: the session has no such parent.
            RequestIdReused: the generation exists, with another request hash.
            Overloaded: the store is full.
        """
        meta = encoding.session_prefix(new.tenant, new.session) + "m"
        encoding.check_generation(new.session, new.generation)
        secret = self._secret or await self._load_secret()
        arguments = encoding.open_arguments(
            new,
            secret=secret,
            owner=self._process_id,
            address=self._address,
            ttl_ms=self._ttl_ms,
            nonce=secrets.token_bytes(8),
        )
        keys = [meta, encoding.index_key(new.tenant), scripts.SECRET_KEY]
        try:
            verdict, *facts = await self._script(self._writer, scripts.OPEN, keys, arguments)
        except _OutOfMemory as error:
            raise Overloaded("the session store is full", retry_delay=encoding.RETRY_DELAY) from error
        if verdict == b"OPENED":
            created, epoch, owner, address = facts
            return Opened(bool(created), epoch, owner.decode(), address.decode())
        if verdict == b"SECRET":
            self._secret = b""
            raise encoding.unavailable("the session store was replaced by another one; try again")
        raise encoding.refusal_to_open(verdict, facts, new)

    async def load_session(self, tenant: str, session: str) -> SessionRecord:
        """The meta record of a session.

        Raises:
            SessionNotFound: there is none.
            NotYetSupported: another version of the system wrote it.
        """
        meta = encoding.session_prefix(tenant, session) + "m"
        return encoding.read_session(session, await self._command(self._reader, "HGETALL", meta))

    async def load_generations(self, tenant: str, session: str, generations: Sequence[str]) -> list[GenerationRecord]:
        """Generations of a session with their logs, in the order that is asked for.

        Raises:
            SessionNotFound: no session can have this id.
            GenerationNotFound: the session does not have one of them, or does not exist.
            LogLost: the store has lost a part of one.
            NotYetSupported: another version of the system wrote it.
        """
        meta = encoding.session_prefix(tenant, session) + "m"
        for generation in generations:
            encoding.check_generation(session, generation)
        records: list[GenerationRecord] = []
        for first in range(0, len(generations), _LOAD_AT_ONCE):
            some = generations[first : first + _LOAD_AT_ONCE]
            reply = await self._script(self._reader, scripts.LOAD, [meta], some)
            records += encoding.read_generations(session, some, reply)
        return records

    async def claim(self, tenant: str, session: str, generation: str, *, expected_owner: str) -> Claimed | Refused:
        """Makes this process the owner if `expected_owner` (or this process) is, and the session RUNNING (R9, R10).

        Raises:
            SessionNotFound: no session can have this id.
            GenerationNotFound: there is no such generation.
            NotYetSupported: another version of the system wrote it.
        """
        meta = encoding.session_prefix(tenant, session) + "m"
        encoding.check_generation(session, generation)
        arguments = [generation, expected_owner, self._process_id, self._address]
        verdict, *facts = await self._script(self._writer, scripts.CLAIM, [meta], arguments)
        if verdict == b"CLAIMED":
            return Claimed(facts[0])
        if verdict in (b"REFUSED", b"FINISHED"):
            return Refused(facts[0].decode(), facts[1].decode(), finished=verdict == b"FINISHED")
        if verdict == b"VERSION":
            raise encoding.other_version(session)
        raise GenerationNotFound(
            "the generation does not exist or has expired",
            metadata={"generation_id": join_generation_id(session, generation)},
        )

    async def write(self, operations: Sequence[Operation]) -> list[Result]:
        """Appends, finishes and parks, in order, of any number of sessions, in one call (R10, R13).

        Each operation succeeds or is refused by itself. When this raises, any number of them may have been done, or
        will be: repeat them all, together with newer ones if there are any.

        Raises:
            ValueError: an operation contradicts itself; nothing was sent.
        """
        if not operations:
            return []
        keys, arguments = encoding.write_arguments(
            self._process_id, check_owner=not failpoints.planted("no_owner_check"), operations=operations
        )
        reply = await self._script(self._writer, scripts.WRITE, keys, arguments)
        results = encoding.read_results(reply, operations)
        self.flushes += 1
        for operation, result in zip(operations, results, strict=True):
            if type(operation) is Append and result.kind is ResultKind.OK:
                self.appended_tokens += len(operation.ids) // 4
        return results

    async def list_sessions(self, tenant: str, page_size: int, page_token: str) -> tuple[list[SessionRecord], str]:
        """One page of a tenant's sessions, the most recently opened first, and the token of the next page.

        A page may be shorter than asked for; only an empty token says that it is the last.

        Raises:
            InvalidRequest: the page token is none of ours.
        """
        time, last = encoding.decode_page_token(page_token)
        metas = f"f:{{{encoding.quote_tenant(tenant)}:"
        arguments = [metas, min(max(page_size, 1), _MOST_PAGE_ENTRIES), time, last]
        stop, page = await self._script(self._reader, indexes.LIST, [encoding.index_key(tenant)], arguments)
        return encoding.read_page(page), encoding.encode_page_token(*stop) if stop else ""

    async def renew_lease(self) -> None:
        """Says that this process lives; to be called each second (R9)."""
        key = scripts.LEASE_PREFIX + self._process_id
        await self._command(self._reader, "SET", key, self._address, "PX", int(LEASE_SECONDS * 1000))

    async def release_lease(self) -> None:
        """Says that this process leaves: what it owns may be adopted at once."""
        await self._command(self._reader, "DEL", scripts.LEASE_PREFIX + self._process_id)

    async def orphans(self) -> list[tuple[str, str, str, str]]:
        """Tenant, session, generation and owner of detached generations that run although their owner is dead (R9)."""
        reply = await self._script(self._reader, indexes.ORPHANS, [scripts.DETACHED_KEY], [scripts.LEASE_PREFIX])
        owners = encoding.pairs(reply)
        return [(*encoding.split_member(member), owner.decode()) for member, owner in owners.items()]

    async def now_ms(self) -> int:
        """The store's clock, in milliseconds since the epoch: the one that deadlines and expiries are on."""
        seconds, microseconds = await self._command(self._reader, "TIME")
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def _load_secret(self) -> bytes:
        """The key of the ids that come from request ids, made by whoever is first (R14)."""
        await self._command(self._reader, "SET", scripts.SECRET_KEY, secrets.token_bytes(32), "NX")
        self._secret = await self._command(self._reader, "GET", scripts.SECRET_KEY) or b""
        if not self._secret:
            raise encoding.unavailable("the session store forgot what it was just told")
        return self._secret

    async def _script(self, client: Redis, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Runs a script, and teaches it to a server that does not know it (any more)."""
        return await self._shielded(_run_script(client, script, keys, arguments))

    async def _command(self, client: Redis, *command: Any) -> Any:
        """Runs a plain command."""
        return await self._shielded(_execute(client, command))

    async def _shielded(self, call: Coroutine[Any, Any, T]) -> T:
        """Waits for a call, but lets it end by itself if its caller is cancelled or has waited long enough."""
        self.calls += 1
        task = asyncio.create_task(call)
        self._pending.add(task)
        task.add_done_callback(self._settle)
        await asyncio.wait((task,), timeout=_GIVE_UP_SECONDS)
        if not task.done():
            raise encoding.unavailable("the session store does not answer in time")
        return task.result()

    def _settle(self, task: asyncio.Task[Any]) -> None:
        self._pending.discard(task)
        if not task.cancelled():
            task.exception()  # seen, even if nobody waits for it any more


class _OutOfMemory(SessionStoreUnavailable):
    """The store refuses what needs memory."""


def _client(url: str, *, connections: int) -> Redis:
    """A client that makes one attempt, within a time limit; `_execute` makes the others.

    redis-py's own retries are nested (commands over connects) and would add up to many times that limit.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=_ATTEMPT_SECONDS,
        socket_timeout=_ATTEMPT_SECONDS,
        socket_connect_timeout=_ATTEMPT_SECONDS,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        driver_info=None,
    )
    return Redis.from_pool(pool)


async def _run_script(client: Redis, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
    try:
        return await _execute(client, ("EVALSHA", script.digest, len(keys), *keys, *arguments))
    except NoScriptError:
        return await _execute(client, ("EVAL", script.source, len(keys), *keys, *arguments))


async def _execute(client: Redis, command: Sequence[Any]) -> Any:
    """Sends a command up to three times; all that we send may be repeated.

    Raises:
        NoScriptError: the server does not know the script.
        SessionStoreUnavailable: it does not answer, or cannot do it now.
        InternalError: it says that the command is wrong.
    """
    failures = 0
    while True:
        try:
            return await client.execute_command(*command)  # type: ignore[no-untyped-call]
        except NoScriptError:
            raise
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            failures += 1
            if failures == _ATTEMPTS:
                raise encoding.unavailable(f"the session store does not answer: {type(error).__name__}") from error
        except ResponseError as error:
            raise _refusal(error) from error
        except RedisError as error:
            raise encoding.unavailable(f"the session store failed: {type(error).__name__}") from error
        await asyncio.sleep(_BACKOFF.compute(failures))


def _refusal(error: ResponseError) -> FermataError:
    """What a server's error means. The text is for the log: it has what the server says, never what a user wrote."""
    text = f"{error.status_code or ''} {error}"
    log.error("the session store refused a call: %s", text)
    if _OUT_OF_MEMORY.search(text):
        return _OutOfMemory("the session store is full", retry_delay=encoding.RETRY_DELAY)
    if _UNABLE.search(text):
        return encoding.unavailable("the session store cannot do this now")
    return InternalError("the session store refused a call, see the service's log")
