"""The bytes of each token id, and text as a pure function of ids (R2, R3).

The table comes from a model's `tokenizer.json`. Knows no prompt, no template and no stream: the tokenizer decodes
with it, the orchestrator matches stop strings with it.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """The reversible byte ↔ character table of byte-level BPE (Radford et al. 2019, GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    characters = {chr(byte): byte for byte in printable}
    characters.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return characters


class Vocabulary:
    """What each id of a model contributes to the text.

    Attributes:
        table: bytes of each id, `table[token_id]`; special tokens and unused ids have none.
        special: names of the control tokens by id.
    """

    def __init__(self, table: list[bytes], special: dict[int, str]) -> None:
        self.table = table
        self.special = special

    def __len__(self) -> int:
        return len(self.table)

    @classmethod
    def from_file(cls, path: Path, size: int = 0) -> Vocabulary:
        """Reads `tokenizer.json`.

        Args:
            path: the file.
            size: number of ids of the model; ids beyond the tokenizer's have no bytes.

        Raises:
            ValueError: the decoder of the tokenizer is of a kind whose bytes are not known.
        """
        return cls.from_tokenizer(Tokenizer.from_file(str(path)), size)

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, size: int = 0) -> Vocabulary:
        """As `from_file`, of a loaded tokenizer."""
        tokens = {token_id: token for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
        added = tokenizer.get_added_tokens_decoder()
        special = {token_id: token.content for token_id, token in added.items() if token.special}
        byte_level = "ByteLevel" in repr(tokenizer.decoder)
        if not byte_level and "Replace" not in repr(tokenizer.decoder) and "Metaspace" not in repr(tokenizer.decoder):
            raise ValueError(f"unknown decoder of the tokenizer: {tokenizer.decoder!r}")
        table = [b""] * max(size, max(tokens, default=-1) + 1)
        for token_id, token in tokens.items():
            if token_id in special:
                continue
            if token_id in added:  # an added token that is not special stands for its own text
                table[token_id] = token.encode()
            else:
                table[token_id] = _byte_level_bytes(token) if byte_level else _metaspace_bytes(token)
        return cls(table, special)

    def bytes_of(self, token_ids: Iterable[int]) -> bytes:
        """Concatenated bytes of the ids (R2). Ids outside the table have none."""
        table, size = self.table, len(self.table)
        return b"".join(table[token_id] for token_id in token_ids if token_id < size)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The whole text of the ids, errors as U+FFFD."""
        return self.bytes_of(token_ids).decode(errors="replace")

    def decode_with_special(self, token_ids: Iterable[int]) -> str:
        """The text of the ids with control tokens shown by their names, as templates write them."""
        pieces = bytearray()
        for token_id in token_ids:
            name = self.special.get(token_id)
            pieces += name.encode() if name is not None else self.bytes_of((token_id,))
        return pieces.decode(errors="replace")


class IncrementalText:
    """Text of a growing sequence of bytes, without an incomplete character and without what is held (R2).

    A message for tokens a..b carries text(b) - text(a-1), whatever the messages before were cut into.
    """

    def __init__(self, pending: bytes = b"") -> None:
        """Begins after some tokens of which `pending` bytes are not shown yet."""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = pending

    def extend(self, new: bytes, held: int = 0) -> str:
        """Adds bytes and returns what they show; the last `held` bytes may still become a stop string."""
        available = self._pending + new
        cut = len(available) - held
        self._pending = available[cut:]
        return self._decoder.decode(available[:cut])

    def finish(self, cut_bytes: int = 0) -> str:
        """Returns the remainder, without the last `cut_bytes` bytes (`Terminal.cut_bytes`)."""
        rest = self._pending[: len(self._pending) - cut_bytes] if cut_bytes else self._pending
        self._pending = b""
        return self._decoder.decode(rest, final=True)


def pending_bytes(shown_candidate: bytes, held: int) -> bytes:
    """Bytes at the end of `shown_candidate` that the text does not show: those held and an incomplete character.

    Args:
        shown_candidate: all bytes of the tokens before a cursor.
        held: how many of them at the end may still become a stop string.
    """
    cut = len(shown_candidate) - held
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    # Four bytes are enough context: an incomplete character has at most three.
    start = max(0, cut - 16)
    while start > 0 and shown_candidate[start] & 0xC0 == 0x80:
        start -= 1
    decoder.decode(shown_candidate[start:cut])
    incomplete, _ = decoder.getstate()
    return incomplete + shown_candidate[cut:]


def _byte_level_bytes(token: str) -> bytes:
    alphabet = _byte_level_alphabet()
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:  # written into the vocabulary by hand, outside the alphabet
        return token.encode()


def _metaspace_bytes(token: str) -> bytes:
    match = _BYTE_FALLBACK.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(_METASPACE, " ").encode()
