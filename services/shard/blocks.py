"""KV blocks, counted: who holds them, what they hold, which one is given away next.

A block has `block_size` token positions. It is *held* (one or more references), *cached* (nobody holds it, but it holds
a full block of a known prefix and is found again), or *free*. Cached blocks count as available: the one that was
released longest ago is given away first.

The prefix cache is a hash chain: the key of a full block covers its ids and, through the key before it, everything in
front of them. Keys are keyed hashes with a secret of the process and begin at the tenant, so that no tenant can find
or guess what another one has cached.

Pure: knows block numbers and token ids; nothing of tensors, sequences or the order in which they run.
"""

from __future__ import annotations

import secrets
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from services.common.types import pack_ids

KEY_BYTES = 16
"""Nobody without the secret can search for collisions, so 128 bits are plenty."""

_TENANT, _BLOCK = b"tenant", b"block"


class OutOfBlocks(Exception):
    """More blocks were asked for than are available; nothing was taken."""


class BlockPool:
    """All blocks of a shard.

    Args:
        block_count: number of blocks.
        block_size: token positions per block.
        prefix_cache: whether full blocks are found again.
        secret: key of the hash chain; drawn if not given.
    """

    def __init__(
        self, block_count: int, block_size: int, *, prefix_cache: bool = True, secret: bytes | None = None
    ) -> None:
        if block_count < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks: {block_count} of {block_size} tokens")
        self.block_count, self.block_size = block_count, block_size
        self._prefix_cache = prefix_cache
        self._secret = secrets.token_bytes(32) if secret is None else secret
        self._references = [0] * block_count
        self._free = list(range(block_count - 1, -1, -1))
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached and not held; longest ago released first
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Number of blocks that can be taken: free ones and those that are only cached."""
        return len(self._free) + len(self._unused)

    def blocks_for(self, token_count: int) -> int:
        """Number of blocks that hold so many tokens."""
        return -(-token_count // self.block_size)

    def take(self, count: int) -> list[int]:
        """Gives away blocks with arbitrary content, each with one reference.

        Raises:
            OutOfBlocks: fewer are available.
        """
        if count > self.available:
            raise OutOfBlocks(f"{count} blocks wanted, {self.available} available")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._unused.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each block; they are held or cached."""
        for block in blocks:
            self._unused.pop(block, None)
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Takes one reference from each block of a table; blocks of known content stay cached.

        The last block goes first: a chain is found from its beginning, so it must be lost from its end.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._unused[block] = None
                else:
                    self._free.append(block)

    def fork(self, table: Sequence[int], token_count: int) -> list[int]:
        """Shares the blocks of the first `token_count` tokens of a sequence with a sibling.

        Nobody writes into full blocks. The last one may be filled in part: see `own_last`.
        """
        shared = list(table[: self.blocks_for(token_count)])
        self.share(shared)
        return shared

    def is_shared(self, block: int) -> bool:
        """Whether a block has more than one holder."""
        return self._references[block] > 1

    def own_last(self, table: list[int]) -> tuple[int, int] | None:
        """Makes the last block of a forked table one that its holder may write into (copy-on-write).

        Returns:
            (source, target), whose content must be copied before the next computation; None when there is nothing to
            copy because no other holder is left.

        Raises:
            OutOfBlocks: there is no block for the copy.
        """
        source = table[-1]
        if not self.is_shared(source):
            self.forget((source,))  # it is about to hold something else
            return None
        (target,) = self.take(1)
        self.release((source,))
        table[-1] = target
        return source, target

    def extend_keys(self, keys: list[bytes], tenant: str, token_ids: Sequence[int]) -> None:
        """Appends the keys of those full blocks of `token_ids` that `keys` lacks."""
        for start in range(len(keys) * self.block_size, len(token_ids) - self.block_size + 1, self.block_size):
            before = keys[-1] if keys else self._hash(tenant.encode(), _TENANT)
            keys.append(self._hash(before + pack_ids(token_ids[start : start + self.block_size]), _BLOCK))

    def match(self, keys: Sequence[bytes], most: int) -> list[int]:
        """Shares the blocks of the longest cached prefix.

        Args:
            keys: of the full blocks of a sequence.
            most: number of blocks that may be used.

        Returns:
            The blocks, with one more reference each.
        """
        found = []
        for key in keys[:most]:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        self.share(found)
        return found

    def publish(self, key: bytes, block: int) -> int:
        """Enters a held block into the prefix cache, now that all its positions are computed.

        Returns:
            The block to use from now on: when another one with the same content is there, that one gets the reference
            and `block` is released (equal ids have bit-equal KV, R23).
        """
        if not self._prefix_cache:
            return block
        known = self._block_of.setdefault(key, block)
        if known == block:
            self._key_of[block] = key
        else:
            self.share((known,))
            self.release((block,))
        return known

    def forget(self, blocks: Iterable[int]) -> None:
        """Takes blocks out of the prefix cache, because their content is not to be trusted. Holders keep them."""
        for block in blocks:
            if block in self._key_of:
                self._forget(block)
            if block in self._unused:
                del self._unused[block]
                self._free.append(block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Counts everything again.

        Args:
            tables: the block tables of all holders.

        Raises:
            AssertionError: the books are wrong; says where.
        """
        counted = Counter(block for table in tables for block in table)
        for block, references in enumerate(self._references):
            if references != counted[block]:
                raise AssertionError(f"block {block}: {references} references, {counted[block]} holders")
        held = {block for block, references in enumerate(self._references) if references}
        free, unused = set(self._free), set(self._unused)
        if len(free) != len(self._free) or len(held) + len(free) + len(unused) != self.block_count:
            raise AssertionError(f"{len(held)} held + {len(self._free)} free + {len(unused)} cached != all blocks")
        if held | free | unused != set(range(self.block_count)):
            raise AssertionError("a block is in two places")
        if {block: key for key, block in self._block_of.items()} != self._key_of:
            raise AssertionError("the two directions of the prefix cache differ")
        if not unused <= self._key_of.keys() or free & self._key_of.keys():
            raise AssertionError("a block without a key is cached, or a free one has a key")

    def _forget(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]

    def _hash(self, data: bytes, kind: bytes) -> bytes:
        return blake2b(data, key=self._secret, person=kind, digest_size=KEY_BYTES).digest()
