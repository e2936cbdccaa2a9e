"""Between the host and a device: a step's index arrays in one transfer, its results behind one wait, and its time.

On the CPU nothing is moved and nothing is waited for. Knows plans and logits; nothing of models and sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from services.shard.kernels.plan import StepPlan

_ALIGNMENT = 8
"""Bytes at whose multiples a tensor lies when all are moved as one."""


def move(plan: StepPlan, device: str) -> StepPlan:
    """The plan with its tensors on a device, in a single transfer that the host does not wait for."""
    return plan if device == "cpu" else unpack(plan, pack(plan, device).to(device, non_blocking=True))


def pack(plan: StepPlan, device: str) -> Tensor:
    """The tensors of a plan one behind the other, uint8 on the host, from where the device can copy them by itself."""
    found = _tensors(plan)
    packed = on_host([sum(map(_space, found))], torch.uint8, device)
    array, first = packed.numpy(), 0
    for tensor in found:
        array[first : first + tensor.nbytes] = tensor.contiguous().numpy().reshape(-1).view(np.uint8)
        first += _space(tensor)
    return packed


def unpack(plan: StepPlan, packed: Tensor) -> StepPlan:
    """`plan` with views of what `pack` made of it, or of a plan with the same shapes, wherever that lies now."""
    found = _tensors(plan)
    parts = packed.split_with_sizes(list(map(_space, found)))
    moved = iter(part[: old.nbytes].view(old.dtype).view(old.shape) for part, old in zip(parts, found, strict=True))
    changed: StepPlan = _change_tensors(plan, lambda _: next(moved))
    return changed


def on_host(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    """Memory of the host that is not yet written; of a kind that CUDA copies to and from while the host goes on."""
    return torch.empty(*shape, dtype=dtype, pin_memory=torch.device(device).type == "cuda")


class Results(NamedTuple):
    """What a step gives, on the host once the device has come so far.

    Attributes:
        values: float32 [D, V], undefined in rows that nobody wants.
        numbers: int64, whether all is finite, then `largest` of each row if some rows are not wanted.
    """

    values: Tensor
    numbers: Tensor


def fetch(finite: Tensor, logits: Tensor, wanted: Sequence[bool], device: str) -> Results:
    """Asks for what the host reads of a step, and does not wait for it.

    Args:
        finite: bool, a single one.
        logits: float32 [D, V].
        wanted: for each row, whether its logits are read; of the others only which one is the largest.
        device: where the tensors are.
    """
    numbers = finite.view(1).long()
    if not all(wanted):
        numbers = torch.cat([numbers, largest(logits)])
    if device == "cpu":
        return Results(logits, numbers)
    values = on_host(logits.shape, logits.dtype, device)
    copy_rows(logits, values, wanted)
    told = on_host(numbers.shape, numbers.dtype, device)
    return Results(values, told.copy_(numbers, non_blocking=True))


def largest(logits: Tensor) -> Tensor:
    """The id of the largest logit of each row, the lowest such; -1 where a logit is not finite: [D, V] gives [D]."""
    least, most = logits.aminmax(dim=-1)
    return torch.where(least.isfinite() & most.isfinite(), logits.argmax(-1), -1)


def copy_rows(source: Tensor, target: Tensor, wanted: Sequence[bool]) -> None:
    """Copies the wanted rows, one copy for those that lie together; no index has to be moved for it."""
    first = 0
    for wants, run in groupby(wanted):
        last = first + sum(1 for _ in run)
        if wants:
            target[first:last].copy_(source[first:last], non_blocking=True)
        first = last


class Event(Protocol):
    """A mark in a device's queue, as `torch.cuda.Event` is one."""

    def record(self, stream: Any) -> None:
        """Puts it behind all that the device was asked for."""
        ...

    def synchronize(self) -> None:
        """Waits until the device has come to it."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this one to another."""
        ...


class Timer(Protocol):
    """How long a device takes for a step."""

    def start(self) -> None:
        """The step begins with what is asked for next."""
        ...

    def stop(self) -> int | None:
        """Waits until the device has done all of it. Returns nanoseconds, None where the host is the device."""
        ...


class HostTimer:
    """`Timer` of the CPU, where whoever asks for a step has waited for it already and knows the time."""

    def start(self) -> None:
        """See `Timer.start`."""

    def stop(self) -> None:
        """See `Timer.stop`."""


class EventTimer:
    """`Timer` by two events; their time includes pauses in which the device waited for the host."""

    def __init__(self, begin: Event, end: Event, stream: Callable[[], object]) -> None:
        """`stream` tells the queue that the step is put into."""
        self._begin, self._end, self._stream = begin, end, stream

    def start(self) -> None:
        """See `Timer.start`."""
        self._begin.record(self._stream())

    def stop(self) -> int:
        """See `Timer.stop`."""
        self._end.record(self._stream())
        self._end.synchronize()
        return round(1e6 * self._begin.elapsed_time(self._end))


def timer_of(device: str) -> Timer:
    """The timer of "cpu", "cuda" or "cuda:N"."""
    if torch.device(device).type == "cpu":
        return HostTimer()
    event: Callable[..., Event] = torch.cuda.Event
    return EventTimer(event(enable_timing=True), event(enable_timing=True), lambda: torch.cuda.current_stream(device))


def _space(tensor: Tensor) -> int:
    """Bytes of a packed tensor with what aligns the next one."""
    return tensor.nbytes + -tensor.nbytes % _ALIGNMENT


def _tensors(plan: StepPlan) -> list[Tensor]:
    found: list[Tensor] = []
    _change_tensors(plan, found.append)
    return found


def _change_tensors(item: Any, change: Callable[[Tensor], Any]) -> Any:
    """What `item` is with other tensors, in whatever lists, dictionaries and dataclasses they are."""
    if isinstance(item, Tensor):
        return change(item)
    if isinstance(item, list):
        return [_change_tensors(part, change) for part in item]
    if isinstance(item, dict):
        return {key: _change_tensors(part, change) for key, part in item.items()}
    if is_dataclass(item) and not isinstance(item, type):
        parts = {field.name: _change_tensors(getattr(item, field.name), change) for field in fields(item)}
        return replace(item, **parts)
    return item
