"""The parts of a token's latency: where each passes, what it is in a few words, and how such times are written.

Knows neither documents nor pictures. What the parts mean to the last detail is told by `fermata.TokenTimings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple


class Place(Enum):
    """Where time passes."""

    TOKENIZER = "tokenizer"
    ORCHESTRATOR = "orchestrator"
    SHARD = "shard"
    NETWORK = "network"
    UNKNOWN = "unknown"


class Part(NamedTuple):
    """One part of the time between two tokens.

    Attributes:
        name: as in `fermata.TokenTimings`, without the unit.
        place: where it passes.
        letter: stands for it in a bar of text.
        description: a few words.
        first_only: only the first token of an answer has it.
    """

    name: str
    place: Place
    letter: str
    description: str
    first_only: bool = False

    @property
    def title(self) -> str:
        """The name for people."""
        return self.name.replace("_", " ")


_ALL = (
    Part("open", Place.TOKENIZER, "o", "before an orchestrator was asked", True),
    Part("render", Place.TOKENIZER, "r", "rendering the conversation", True),
    Part("encode", Place.TOKENIZER, "e", "turning the prompt into ids", True),
    Part("claim", Place.ORCHESTRATOR, "c", "until the session store had it", True),
    Part("place", Place.ORCHESTRATOR, "p", "until a shard was asked", True),
    Part("admission", Place.SHARD, "a", "until the prompt's first step began", True),
    Part("prefill", Place.SHARD, "f", "steps of the prompt but the last", True),
    Part("wait", Place.SHARD, "W", "until the step began"),
    Part("schedule", Place.SHARD, "S", "choosing the batch of the step"),
    Part("forward", Place.SHARD, "F", "forward pass of the step"),
    Part("sample", Place.SHARD, "A", "filters, masks and draw"),
    Part("publish", Place.SHARD, "U", "from the draw to leaving the shard"),
    Part("shard_hop", Place.NETWORK, "H", "from the shard to the orchestrator"),
    Part("commit", Place.ORCHESTRATOR, "C", "until readers may see it (the store)"),
    Part("relay", Place.ORCHESTRATOR, "R", "from then to leaving the orchestrator"),
    Part("hop", Place.NETWORK, "N", "from the orchestrator to the tokenizer"),
    Part("queue", Place.TOKENIZER, "Q", "until its turn came"),
    Part("detokenize", Place.TOKENIZER, "D", "turning ids into text"),
    Part("write", Place.TOKENIZER, "I", "while the reader took earlier events"),
    Part("unaccounted", Place.UNKNOWN, "?", "what no part accounts for"),
)

PARTS: Mapping[str, Part] = {part.name: part for part in _ALL}
"""All parts that the server tells of, by name, in the order in which a token goes through them."""


def duration(microseconds: float) -> str:
    """A time for people: `85 µs`, `412.1 ms`, `2.41 s`."""
    if abs(microseconds) < 999.5:
        return f"{round(microseconds)} µs"
    if abs(microseconds) < 999_950:
        return f"{microseconds / 1e3:.1f} ms"
    return f"{microseconds / 1e6:.2f} s"


def percent(share: float, digits: int = 0) -> str:
    """A share for people: `94 %`."""
    return f"{round(100 * share, digits) + 0.0:.{digits}f} %"  # what is added makes -0 a 0
