"""The running hash over output tokens (R16): how a reader and the log know that they speak of the same tokens.

Knows ids only. Servers and clients both use this one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

EMPTY_HASH = bytes(8)
"""Hash of no token."""

_pack_id = struct.Struct("<I").pack
_sha256 = hashlib.sha256


def extend_hash(running_hash: bytes, token_id: int) -> bytes:
    """Returns the first 8 bytes of SHA-256(running_hash ‖ id as little-endian u32)."""
    return _sha256(running_hash + _pack_id(token_id)).digest()[:8]


def hash_ids(token_ids: Iterable[int], running_hash: bytes = EMPTY_HASH) -> bytes:
    """Returns the hash after all `token_ids`, continuing from `running_hash`."""
    for token_id in token_ids:
        running_hash = extend_hash(running_hash, token_id)
    return running_hash
