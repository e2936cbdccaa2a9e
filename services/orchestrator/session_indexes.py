"""The Lua scripts over all sessions: listing them, and finding detached generations that nobody runs (R9).

The indexes are hints: what they name may have expired since, and each script removes what it finds so. Keys and fields
are those of `session_scripts.py`. Knows nothing of the client.
"""

from __future__ import annotations

from services.orchestrator.session_scripts import Script

LIST = Script("""
-- KEYS: index. ARGV: prefix of the metas, page size; then time and id of the session to go on after (or '').
-- Replies with time and id to go on after, if there may be more, and with the page: sessions and their metas.
local index, prefix, size, last_time, last = KEYS[1], ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local BATCH, MOST = 100, 5000
local page, expired, stop = {}, {}, false

-- Whether it stopped before the end: the page is full, or there are very many expired sessions on the way.
local function collect()
  local highest = last_time == '' and '+inf' or last_time
  for looked = 0, MOST - 1, BATCH do
    local entries = redis.call('ZREVRANGEBYSCORE', index, highest, '-inf', 'WITHSCORES', 'LIMIT', looked, BATCH)
    for position = 1, #entries, 2 do
      local session, time = entries[position], entries[position + 1]
      -- Sessions of the same millisecond are in descending order, too.
      if time ~= last_time or session < last then
        if #page == size then
          return true
        end
        local fields = redis.call('HGETALL', prefix .. session .. '}:m')
        if #fields == 0 then
          expired[#expired + 1] = session
        else
          page[#page + 1] = {session, fields}
        end
        stop = {time, session}
      end
    end
    if #entries < 2 * BATCH then
      return false
    end
  end
  return true
end

local more = collect()
for _, session in ipairs(expired) do
  redis.call('ZREM', index, session)
end
return {more and stop, page}
""")

ORPHANS = Script("""
-- KEYS: detached index. ARGV: prefix of the leases. Replies with members and owners whose lease is gone.
local index, leases = KEYS[1], ARGV[1]
local alive, found = {}, {}
local entries = redis.call('HGETALL', index)
for position = 1, #entries, 2 do
  local member, owner = entries[position], entries[position + 1]
  if alive[owner] == nil then
    alive[owner] = redis.call('EXISTS', leases .. owner) == 1
  end
  if not alive[owner] then
    local tag, generation = string.sub(member, 1, -18), string.sub(member, -16)
    if redis.call('HGET', 'f:{' .. tag .. '}:m', 'active') == generation then
      found[#found + 1], found[#found + 2] = member, owner
    else
      redis.call('HDEL', index, member)
    end
  end
end
return found
""")
