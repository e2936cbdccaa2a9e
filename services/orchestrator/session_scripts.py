"""The Lua scripts over one session: each is one atomic step over its records (R10, R12, R13).

    f:{tenant:session}:m  hash    v, state, owner, address, epoch, active, generations, labels, created, ttl, expires
    …:g:<g>               hash    v, what was opened, choices, open (choices that have not ended), t<j> (terminals)
    …:g:<g>:p             string  the ids that the generation added, packed u32
    …:g:<g>:c<j>          string  output ids of choice j, packed u32
    f:index:<tenant>      zset    sessions by the time of their opening
    f:detached            hash    tenant:session.generation → owner, of running detached generations
    f:lease:<process>     string  exists while the process lives (R9)
    f:secret              string  key of the ids that come from request ids (R14)

All keys of a session are made by the call that opens them and expire at the same moment, so a missing one is a loss.
Plain `EVALSHA`, for Redis 6.2, Valkey and all later ones. Further keys of a session are made from the prefix of its
meta; the last four kinds lie outside of its slot: a primary with replicas, not a cluster. Nothing that a user wrote is
ever part of an error.
The scripts over all sessions are in `session_indexes.py`.
Knows nothing of the client; `session_encoding.py` makes the arguments and reads the replies.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from services.common.types import RECORD_VERSION, FinishReason

LEASE_PREFIX = "f:lease:"
INDEX_PREFIX = "f:index:"
SECRET_KEY = "f:secret"
DETACHED_KEY = "f:detached"

RENEW_MS = 30_000
"""A session's expiry is moved at most this often (or four times per time to live, if that is oftener)."""


@dataclass(frozen=True, slots=True)
class Script:
    """A script with the digest by which a server that has it knows it."""

    source: str
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        # SHA-1 is what EVALSHA takes; nothing secret hangs on it.
        object.__setattr__(self, "digest", hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest())


_CONSTANTS = f"""
local RECORD_VERSION = '{RECORD_VERSION}'
local CANCELLED = {int(FinishReason.CANCELLED)}
local RENEW_MS = {RENEW_MS}
local DETACHED = '{DETACHED_KEY}'
"""

_COMMON = """
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- R10: later than every epoch before it, even when the store went back to an older state.
local function next_epoch(stored, now)
  return math.max((tonumber(stored) or 0) + 1, now)
end

local function prefix_of(meta)
  return string.sub(meta, 1, -2)
end

local function detached_member(prefix, generation)
  return string.sub(prefix, 4, -3) .. '.' .. generation
end

local function expire_generation(record, at)
  redis.call('PEXPIREAT', record, at)
  redis.call('PEXPIREAT', record .. ':p', at)
  for choice = 0, (tonumber(redis.call('HGET', record, 'choices')) or 0) - 1 do
    redis.call('PEXPIREAT', record .. ':c' .. choice, at)
  end
end

-- Slides the expiry of all keys of a session. Seldom, for it touches every generation.
local function renew(meta, expires, ttl, now)
  expires, ttl = tonumber(expires), tonumber(ttl)
  if now + ttl - expires < math.min(RENEW_MS, ttl / 4) then
    return expires
  end
  local at, prefix = now + ttl, prefix_of(meta)
  local generations = redis.call('HGET', meta, 'generations')
  for first = 1, #generations, 16 do
    expire_generation(prefix .. 'g:' .. string.sub(generations, first, first + 15), at)
  end
  redis.call('HSET', meta, 'expires', at)
  redis.call('PEXPIREAT', meta, at)
  return at
end

-- The last choice has ended: the session is free for the next generation.
local function release(meta, prefix, generation)
  if redis.call('HGET', meta, 'active') == generation then
    redis.call('HSET', meta, 'state', 'idle', 'active', '')
  end
  redis.call('HDEL', DETACHED, detached_member(prefix, generation))
end
"""

OPEN = Script(
    _CONSTANTS
    + _COMMON
    + """
-- KEYS: meta, index, secret.
-- ARGV: secret, generation, session, new session (1 or 0), expected number of generations (or ''), owner, address,
--       time to live, request hash, nonce of the call, parent and its choice and count, choices, detached (1 or 0),
--       prompt ids, labels; then fields and values of the generation's record.
local meta, index, secret_key = KEYS[1], KEYS[2], KEYS[3]
local secret, generation, session, is_new, expected, owner, address = unpack(ARGV, 1, 7)
local ttl, request_hash, nonce = tonumber(ARGV[8]), ARGV[9], ARGV[10]
local parent, parent_choice, parent_count = ARGV[11], ARGV[12], tonumber(ARGV[13])
local choices, detached, prompt, labels = tonumber(ARGV[14]), ARGV[15], ARGV[16], ARGV[17]
local prefix = prefix_of(meta)
local record = prefix .. 'g:' .. generation
local now = now_ms()

-- An emptied store gets the secret back; with another one the ids of the request would not be found again (R14).
if redis.call('SET', secret_key, secret, 'NX') == false and redis.call('GET', secret_key) ~= secret then
  return {'SECRET'}
end

local stored = redis.call('HMGET', meta, 'v', 'owner', 'address', 'epoch', 'state', 'active', 'generations', 'expires',
  'ttl')
local version, stored_owner, stored_address, stored_epoch, state, active, generations = unpack(stored, 1, 7)
if version and version ~= RECORD_VERSION then
  return {'VERSION'}
end

-- A retry finds what it made. The nonce tells a lost reply of this very call from another call of the same request.
local made = redis.call('HMGET', record, 'request_hash', 'nonce')
if made[1] and version then
  if made[1] ~= request_hash then
    return {'REUSED'}
  end
  return {'OPENED', made[2] == nonce and 1 or 0, tonumber(stored_epoch), stored_owner, stored_address}
end

if is_new == '1' then
  if version then
    return {'REUSED'}
  end
  generations = ''
else
  if not version then
    return {'MISSING'}
  end
  if state == 'running' then
    return {'BUSY', active}
  end
  if expected ~= '' and tonumber(expected) ~= #generations / 16 then
    return {'CHANGED'}
  end
end
if parent ~= '' then
  local parent_record = prefix .. 'g:' .. parent
  local parent_choices = tonumber(redis.call('HGET', parent_record, 'choices'))
  if not parent_choices or tonumber(parent_choice) >= parent_choices then
    return {'PARENT'}
  end
  if redis.call('STRLEN', parent_record .. ':c' .. parent_choice) < parent_count * 4 then
    return {'CHANGED'}
  end
end

-- R12: a parked generation is finished as CANCELLED where its log ends.
if state == 'parked' then
  local parked = prefix .. 'g:' .. active
  local fields = redis.call('HMGET', parked, 'choices', 'position')
  for choice = 0, (tonumber(fields[1]) or 0) - 1 do
    local count = redis.call('STRLEN', parked .. ':c' .. choice) / 4
    -- The same bytes as `encode_terminal` makes.
    redis.call('HSETNX', parked, 't' .. choice,
      string.format('{"count":%d,"prompt_tokens":%d,"reason":%d}', count, tonumber(fields[2]), CANCELLED))
  end
  redis.call('HSET', parked, 'open', 0)
  release(meta, prefix, active)
end

local expires = now + ttl
if is_new == '1' then
  redis.call('HSET', meta, 'v', RECORD_VERSION, 'labels', labels, 'created', now, 'ttl', ttl, 'expires', expires)
  redis.call('PEXPIREAT', meta, expires)
  redis.call('ZADD', index, now, session)
  -- The index knows no expiry of members: each opening looks at three, so at most about a third of it is stale.
  for _, other in ipairs(redis.call('ZRANDMEMBER', index, 3)) do
    if redis.call('EXISTS', string.sub(prefix, 1, -(#session + 3)) .. other .. '}:m') == 0 then
      redis.call('ZREM', index, other)
    end
  end
else
  expires = renew(meta, stored[8], stored[9], now)
end

local epoch = next_epoch(stored_epoch, now)
redis.call('HSET', meta, 'state', 'running', 'owner', owner, 'address', address, 'epoch', epoch, 'active', generation,
  'generations', generations .. generation)
redis.call('HSET', record, 'v', RECORD_VERSION, 'created', now, 'request_hash', request_hash, 'nonce', nonce,
  'choices', choices, 'open', choices, 'detached', detached, unpack(ARGV, 18))
redis.call('SET', record .. ':p', prompt)
for choice = 0, choices - 1 do
  redis.call('SET', record .. ':c' .. choice, '')
end
expire_generation(record, expires)
if detached == '1' then
  redis.call('HSET', DETACHED, detached_member(prefix, generation), owner)
end
return {'OPENED', 1, epoch, owner, address}
"""
)

CLAIM = Script(
    _CONSTANTS
    + _COMMON
    + """
-- KEYS: meta. ARGV: generation, expected owner, new owner, its address.
local meta = KEYS[1]
local generation, expected, owner, address = unpack(ARGV)
local prefix, now = prefix_of(meta), now_ms()
local stored = redis.call('HMGET', meta, 'v', 'owner', 'address', 'epoch', 'active', 'expires', 'ttl')
if not stored[1] then
  return {'MISSING'}
end
if stored[1] ~= RECORD_VERSION then
  return {'VERSION'}
end
local open = redis.call('HGET', prefix .. 'g:' .. generation, 'open')
if not open then
  return {'MISSING'}
end
if open == '0' or stored[5] ~= generation then
  return {'FINISHED', stored[2], stored[3]}
end
-- The new owner itself is expected, too: that is a retry whose first reply was lost.
if stored[2] ~= expected and stored[2] ~= owner then
  return {'REFUSED', stored[2], stored[3]}
end
local epoch = next_epoch(stored[4], now)
redis.call('HSET', meta, 'state', 'running', 'owner', owner, 'address', address, 'epoch', epoch)
local member = detached_member(prefix, generation)
if redis.call('HEXISTS', DETACHED, member) == 1 then
  redis.call('HSET', DETACHED, member, owner)
end
renew(meta, stored[6], stored[7], now)
return {'CLAIMED', epoch}
"""
)

WRITE = Script(
    _CONSTANTS
    + _COMMON
    + """
-- KEYS: the meta of each operation's session. ARGV: owner, whether it is checked (1 or 0); then of each operation
--       kind, generation, choice, epoch, offset or count in one string, and ids or terminal.
-- Replies with one entry per operation, in `ResultKind`'s numbers.
local OK, DUPLICATE, FENCED, CONFLICT, DIVERGED, FINISHED, MISSING = 0, 1, 2, 3, 4, 5, 6
local owner, check_owner = ARGV[1], ARGV[2] == '1'
local now = now_ms()

local function append(log, first, ids, terminal, expires)
  local start, size = first * 4, redis.call('STRLEN', log)
  if start > size then
    return {CONFLICT, size / 4}
  end
  local known = math.min(size - start, #ids)
  if known > 0 then
    if redis.call('GETRANGE', log, start, start + known - 1) ~= string.sub(ids, 1, known) then
      return {DIVERGED, size / 4}
    end
    ids = string.sub(ids, known + 1)
  end
  if #ids == 0 then
    return DUPLICATE
  end
  if terminal then
    return {FINISHED, terminal}
  end
  redis.call('APPEND', log, ids)
  if size == 0 then
    redis.call('PEXPIREAT', log, expires)
  end
  return OK
end

local function finish(meta, prefix, generation, choice, count, terminal, stored_terminal)
  if stored_terminal then
    return stored_terminal == terminal and DUPLICATE or {FINISHED, stored_terminal}
  end
  local record = prefix .. 'g:' .. generation
  local size = redis.call('STRLEN', record .. ':c' .. choice)
  if size ~= count * 4 then
    return {CONFLICT, size / 4}
  end
  redis.call('HSET', record, 't' .. choice, terminal)
  if redis.call('HINCRBY', record, 'open', -1) == 0 then
    release(meta, prefix, generation)
  end
  return OK
end

local function park(meta, record, epoch, stored_epoch, stored_owner)
  if redis.call('HGET', record, 'open') == '0' then
    return {FINISHED, redis.call('HGET', record, 't0')}
  end
  -- A late park must not undo the claim by which its own process went on since.
  if epoch ~= stored_epoch and check_owner then
    return {FENCED, tonumber(stored_epoch), stored_owner}
  end
  if redis.call('HGET', meta, 'state') == 'parked' then
    return DUPLICATE
  end
  redis.call('HSET', meta, 'state', 'parked')
  return OK
end

local function apply(meta, head, payload)
  local stored = redis.call('HMGET', meta, 'owner', 'epoch', 'expires', 'ttl')
  if not stored[1] then
    return MISSING
  end
  if check_owner and stored[1] ~= owner then
    return {FENCED, tonumber(stored[2]), stored[1]}
  end
  -- One string for five values: the client's cost is by the number of arguments.
  local kind, generation, choice, epoch, number = string.match(head, '^(%u)(%x+):(%d+):(%d+):(%d+)$')
  local prefix = prefix_of(meta)
  local record = prefix .. 'g:' .. generation
  local fields = redis.call('HMGET', record, 'choices', 't' .. choice)
  if not fields[1] or tonumber(choice) >= tonumber(fields[1]) then
    return MISSING
  end
  local expires = renew(meta, stored[3], stored[4], now)
  if kind == 'A' then
    return append(record .. ':c' .. choice, tonumber(number), payload, fields[2], expires)
  elseif kind == 'F' then
    return finish(meta, prefix, generation, choice, tonumber(number), payload, fields[2])
  end
  return park(meta, record, epoch, stored[2], stored[1])
end

local results = {}
for index, meta in ipairs(KEYS) do
  results[index] = apply(meta, ARGV[2 * index + 1], ARGV[2 * index + 2])
end
return results
"""
)

LOAD = Script("""
-- KEYS: meta. ARGV: generations. Replies with the session's version and generations, then of each generation its
-- fields, its prompt ids and its logs.
local meta = KEYS[1]
local prefix = string.sub(meta, 1, -2)
local reply = redis.call('HMGET', meta, 'v', 'generations')
for _, generation in ipairs(ARGV) do
  local record = prefix .. 'g:' .. generation
  local entry = {redis.call('HGETALL', record), redis.call('GET', record .. ':p')}
  for choice = 0, (tonumber(redis.call('HGET', record, 'choices')) or 0) - 1 do
    entry[choice + 3] = redis.call('GET', record .. ':c' .. choice)
  end
  reply[#reply + 1] = entry
end
return reply
""")
