"""Where the time of a token went (R25): the moments that each place takes down, and the parts that they make.

A moment is in nanoseconds of the monotonic clock of the process that took it; moments of two clocks are never
subtracted. The time on the way between two places is what the interval between two tokens grew by there, so no clock
has to be set. Pure.
"""

from __future__ import annotations

from typing import NamedTuple


class StepMoments(NamedTuple):
    """A step of a shard, as its orchestrator knows it.

    Attributes:
        shard: process id of the shard, which names its clock.
        number: counts the shard's steps.
        started: the step began.
        schedule, forward, sample: how long its parts took.
        departed: the tokens left the engine.
        sent: the message with them left the shard.
        arrived: it arrived at the orchestrator, on whose clock this is.
    """

    shard: str
    number: int
    started: int
    schedule: int
    forward: int
    sample: int
    departed: int
    sent: int
    arrived: int


class FirstMoments(NamedTuple):
    """The way of a generation to its first token, as its orchestrator knows it.

    Attributes:
        opened: the call that opens it arrived at the orchestrator, on whose clock this and the two next are.
        claimed: the session store had it.
        placed: it was given to a shard.
        admitted: it arrived at the shard, on whose clock this and the next are.
        started: the first step that computed some of its prompt began.
    """

    opened: int
    claimed: int
    placed: int
    admitted: int
    started: int


class CallMoments(NamedTuple):
    """The call that asks for a generation, on the clock of the tokenizer that took it.

    Attributes:
        arrived: it arrived.
        render, encode: how long its prompt took.
        sent: the orchestrator was asked to open the generation.
    """

    arrived: int
    render: int
    encode: int
    sent: int


class TokenMoments(NamedTuple):
    """A token, as the tokenizer knows it when it has arrived there.

    Attributes:
        step: that drew it; None where nobody knows, as for tokens that come from the session store.
        clock: names the orchestrator's clock.
        visible: readers could see it, on the orchestrator's clock.
        sent: the message with it left the orchestrator, on its clock.
        received: it arrived at the tokenizer, on whose clock this and all later moments are.
        first: of the first token of a choice, its way there, as far as it is known.
    """

    step: StepMoments | None
    clock: int
    visible: int
    sent: int
    received: int
    first: FirstMoments | None = None


class Delivery(NamedTuple):
    """How the tokenizer told the tokens of one event.

    Attributes:
        began: the event's turn came.
        filled: its text was there.
        departed: it was handed to the call.
        written: how much of the time before `began` passed while the reader took earlier events, counted back from
            `began`.
    """

    began: int
    filled: int
    departed: int
    written: int


class Parts(NamedTuple):
    """The parts of an inter-token interval, signed nanoseconds; they sum to `interval`.

    The first seven belong to the first token alone; their meaning is that of `fermata.v1.TokenTimings`.
    """

    interval: int = 0
    open: int = 0
    render: int = 0
    encode: int = 0
    claim: int = 0
    place: int = 0
    admission: int = 0
    prefill: int = 0
    wait: int = 0
    schedule: int = 0
    forward: int = 0
    sample: int = 0
    publish: int = 0
    shard_hop: int = 0
    commit: int = 0
    relay: int = 0
    hop: int = 0
    queue: int = 0
    detokenize: int = 0
    write: int = 0
    unaccounted: int = 0


class Told(NamedTuple):
    """A token that was told, and how."""

    moments: TokenMoments
    delivery: Delivery


def between(previous: Told, current: Told) -> Parts:
    """The parts of the interval between two tokens of a choice that one tokenizer told, in this order.

    What cannot be known because another shard or orchestrator took over in between is `unaccounted`.
    """
    (then, last_told), (now, told) = previous, current
    interval = told.departed - last_told.departed
    queue, detokenize, write = _residence(now.received, told)
    last_queue, last_detokenize, last_write = _residence(then.received, last_told)
    queue, detokenize, write = queue - last_queue, detokenize - last_detokenize, write - last_write
    wait = schedule = forward = sample = publish = shard_hop = commit = relay = hop = 0
    if now.clock == then.clock:
        relay = (now.sent - then.sent) - (now.visible - then.visible)
        hop = (now.received - then.received) - (now.sent - then.sent)
        step, last = now.step, then.step
        if step is not None and last is not None and step.shard == last.shard:
            schedule, forward, sample = step.schedule, step.forward, step.sample
            wait = step.started - last.departed
            publish = (step.sent - step.started - schedule - forward - sample) - (last.sent - last.departed)
            shard_hop = (step.arrived - last.arrived) - (step.sent - last.sent)
            commit = (now.visible - then.visible) - (step.arrived - last.arrived)
    known = wait + schedule + forward + sample + publish + shard_hop + commit
    known += relay + hop + queue + detokenize + write
    # Positional, for it runs once per token.
    return Parts(
        *(interval, 0, 0, 0, 0, 0, 0, 0, wait, schedule, forward, sample, publish, shard_hop, commit),
        *(relay, hop, queue, detokenize, write, interval - known),
    )


def first(current: Told, call: CallMoments) -> Parts:
    """The parts of the time from a call to the first token of a choice that it is told."""
    moments, step, way = current.moments, current.moments.step, current.moments.first
    queue, detokenize, write = _residence(moments.received, current.delivery)
    parts = Parts(
        interval=current.delivery.departed - call.arrived,
        relay=moments.sent - moments.visible,
        queue=queue,
        detokenize=detokenize,
        write=write,
    )
    if step is not None:
        parts = parts._replace(
            schedule=step.schedule,
            forward=step.forward,
            sample=step.sample,
            publish=step.sent - step.started - step.schedule - step.forward - step.sample,
            commit=moments.visible - step.arrived,
        )
        if way is not None and call.sent:
            parts = parts._replace(
                open=call.sent - call.arrived - call.render - call.encode,
                render=call.render,
                encode=call.encode,
                claim=way.claimed - way.opened,
                place=way.placed - way.claimed,
                admission=way.started - way.admitted,
                prefill=step.started - way.started,
                shard_hop=(step.arrived - way.placed) - (step.sent - way.admitted),
                hop=(moments.received - call.sent) - (moments.sent - way.opened),
            )
    return parts._replace(unaccounted=parts.interval - sum(parts[1:]))


def _residence(received: int, told: Delivery) -> tuple[int, int, int]:
    """How long a token waited at the tokenizer, was turned into text, and waited for the reader."""
    began, filled, departed, written = told
    return began - received - written, filled - began, written + departed - filled
