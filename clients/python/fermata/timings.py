"""Where the time of each token went, as the reader knows it: what the server tells, and the last way to this process.

Knows neither calls nor clocks: moments are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

from fermata.v1 import generation_pb2


@dataclass(frozen=True, slots=True)
class TokenTimings:
    """Where the time of one token went, in nanoseconds.

    The parts are signed differences against the previous token of the choice and sum to `total_ns`, the time since
    the event with that one arrived; of the first token they are whole durations.

    Attributes:
        open_ns: of the first token alone, as the six next: from the arrival of the call at the tokenizer to its
            leaving for the orchestrator, without the two next.
        render_ns: rendering the conversation.
        encode_ns: turning the prompt into ids.
        claim_ns: at the orchestrator until the session store had the generation.
        place_ns: at the orchestrator, from then until a shard was asked.
        admission_ns: at the shard until the first step that computed some of the prompt.
        prefill_ns: the steps before the one that drew the token.
        wait_ns: at the shard, from the previous token's leaving the engine to the begin of the step that drew this.
        schedule_ns: choosing the batch of the step.
        forward_ns: its forward pass.
        sample_ns: filters, masks and draw.
        publish_ns: from the draw to the message's leaving the shard.
        shard_hop_ns: on the way from the shard to the orchestrator.
        commit_ns: at the orchestrator until readers may see it.
        relay_ns: at the orchestrator, from then to the message's leaving for the tokenizer.
        hop_ns: on the way from the orchestrator to the tokenizer.
        queue_ns: at the tokenizer until its turn came.
        detokenize_ns: turning ids into text.
        write_ns: at the tokenizer while the reader took earlier events.
        network_ns: on the way from the tokenizer to this process; 0 for the first token.
        unaccounted_ns: what no part accounts for, such as a takeover.
    """

    open_ns: int
    render_ns: int
    encode_ns: int
    claim_ns: int
    place_ns: int
    admission_ns: int
    prefill_ns: int
    wait_ns: int
    schedule_ns: int
    forward_ns: int
    sample_ns: int
    publish_ns: int
    shard_hop_ns: int
    commit_ns: int
    relay_ns: int
    hop_ns: int
    queue_ns: int
    detokenize_ns: int
    write_ns: int
    network_ns: int
    unaccounted_ns: int

    @property
    def total_ns(self) -> int:
        """All parts together."""
        return sum(getattr(self, name) for name in self.__slots__)


PARTS = tuple(name.removesuffix("_ns") for name in TokenTimings.__slots__)
"""Names of the parts, in the order in which a token goes through them."""
_OF_SERVER = [name for name in TokenTimings.__slots__ if name != "network_ns"]


class LastWay:
    """Adds the way from the tokenizer, one call's tokens at a time."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, int]] = {}

    def begin(self) -> None:
        """A new call begins, perhaps to another process with another clock."""
        self._last.clear()

    def timings(self, tokens: generation_pb2.Tokens, arrived_ns: int) -> tuple[TokenTimings, ...]:
        """The timings of the tokens of a message that arrived at `arrived_ns` on this process's monotonic clock."""
        found = []
        for message in tokens.timings:
            network = 0
            if (last := self._last.get(tokens.choice)) is not None:
                arrived, departed = last
                network = (arrived_ns - arrived) - (message.departed_ns - departed)
            self._last[tokens.choice] = arrived_ns, message.departed_ns
            found.append(TokenTimings(network_ns=network, **{name: getattr(message, name) for name in _OF_SERVER}))
        return tuple(found)
