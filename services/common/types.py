"""The shared vocabulary: values that more than one service speaks of.

Leaf module: imports nothing of the package, and knows neither gRPC, protobuf, torch nor Redis.
"""

from __future__ import annotations

import enum
import re
import sys
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

VERSION = "0.1.0"
RECORD_VERSION = 1
"""Version of what is stored (R13); a record of another version is refused."""

NOISE_VERSION = 1
"""Version of the noise (R21); part of the fingerprint."""

DEFAULT_TENANT = "default"

SESSION_PATTERN = re.compile(r"[a-z2-7]{26}")
"""Form of a session's id: 128 bits as base32 (R14)."""
GENERATION_PATTERN = re.compile(r"[0-9a-f]{16}")
"""Form of what follows the session and a dot in a generation_id: 64 bits as hex (R14)."""


class FinishReason(enum.IntEnum):
    """Why a choice ended. The numbers are those of `fermata.v1.FinishReason`."""

    UNSPECIFIED = 0
    STOP_TOKEN = 1
    STOP_STRING = 2
    MAX_TOKENS = 3
    CONTEXT_LENGTH = 4
    TIME_LIMIT = 5
    CANCELLED = 6
    ERROR = 7


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a reader has come in one choice (R4). `running_hash` may be empty."""

    choice: int
    count: int
    running_hash: bytes = b""


@dataclass(frozen=True, slots=True)
class Tail:
    """Output ids that a reader hands back because the log lost them (R16)."""

    choice: int
    first_offset: int
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class SamplingProgram:
    """How the next token is chosen (R22), in token ids, nothing unset.

    Attributes:
        temperature: 0 is arg-max.
        top_k: keep exactly this many; 0 keeps all.
        top_p: keep a token while the mass before it is below; 1 keeps all.
        min_p: keep tokens of at least this share of the highest probability; 0 keeps all.
        repetition_penalty: over the whole sequence; 1 is off.
        presence_penalty: over this generation's output; 0 is off.
        frequency_penalty: times the count in this generation's output; 0 is off.
        logit_bias: added to the logits of these ids.
        allowed_token_ids: only these may be chosen; None allows all.
        bad_words: id sequences that are never completed.
        seed: 64 bits, key of the noise (R21).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class StopRules:
    """When a choice ends, besides the end of the context (R3).

    Attributes:
        max_tokens: most output tokens; 0 is the rest of the context.
        min_tokens: stops are not looked for before this many output tokens.
        strings: matched over the bytes of the ids.
        token_ids: all ids that stop, the model's own included unless they are ignored.
        include_stop_string: keep the stop string in the text.
        ignore_eos: whether the model's own end tokens were left out of `token_ids`.
    """

    max_tokens: int = 0
    min_tokens: int = 0
    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    include_stop_string: bool = False
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What two replicas must have in common to promise each other the same tokens (R20)."""

    model: str = ""
    weights: str = ""
    kernels: str = ""
    tokenizer: str = ""
    parallel_degree: int = 1
    noise_version: int = NOISE_VERSION


def pack_ids(token_ids: Iterable[int]) -> bytes:
    """Packs ids as little-endian u32, the form of the log and of the internal messages.

    Raises:
        OverflowError: an id does not fit 32 bits.
    """
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(packed: bytes) -> list[int]:
    """Inverse of `pack_ids`.

    Raises:
        ValueError: the length is not a multiple of four.
    """
    token_ids = array("I")
    token_ids.frombytes(packed)
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids.tolist()
