"""Large private memory: on large pages, side by side, and resident before anybody needs it.

Knows bytes; nothing of what is kept in them.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Sequence

_PAGE, _LINE = 2 << 20, 64
_CHUNK = 64 << 20
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE (madvise(2), Linux 5.14), which `mmap` has no name for."""
_AHEAD = 32 << 20
"""Bytes that are resident at least, beyond those in use."""


def zeros(size: int) -> mmap.mmap:
    """Memory that is zero and takes none until it is written, on large pages where the system has them: whoever walks
    through all of it, or jumps about in it, pays for a walk through the page tables with each small page."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def address(memory: mmap.mmap) -> int:
    """Where it begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Arena:
    """Zeros that live as long as this, side by side: a matrix of less than a large page, or the rest of one that is
    larger, would otherwise lie on small ones."""

    def __init__(self) -> None:
        self._memories: list[mmap.mmap] = []
        self._next = self._left = 0

    def take(self, size: int) -> int:
        """Address of so many bytes, on a cache line's boundary."""
        size = -(-size // _LINE) * _LINE
        if size > self._left:
            self._memories.append(zeros(max(size, _CHUNK)))
            self._next, self._left = address(self._memories[-1]), len(self._memories[-1])
        place = self._next
        self._next += size
        self._left -= size
        return place


class Populator:
    """Makes memory resident shortly before it is used.

    The first write to a large page waits until the system has found and cleared one, which takes a fraction of a
    millisecond, and five in a virtual machine whose host must find it first. A step that comes to a new page in the
    keys and values of every layer at once would wait for all of them. Here a thread does, which is there only
    meanwhile. Where the system cannot be told, pages come when they are written, as everywhere.

    Args:
        memories: what is used together.
        parts: in how many equal parts each is used, from the first to the last.
    """

    def __init__(self, memories: Sequence[mmap.mmap], parts: int) -> None:
        self._memories, self._parts = memories, parts
        self._part_size = len(memories[0]) / parts
        self._ahead = max(1, int(_AHEAD / len(memories) / self._part_size))
        self._until = 0  # parts that are resident, or will be when the thread is done
        self._thread: threading.Thread | None = None

    def reach(self, part: int) -> None:
        """Says that the parts up to this one are in use. Never waits."""
        if self._until >= min(part + self._ahead, self._parts) or (self._thread and self._thread.is_alive()):
            return
        begin, self._until = self._until, min(part + 2 * self._ahead, self._parts)
        span = int(begin * self._part_size), int(self._until * self._part_size)
        self._thread = threading.Thread(target=self._populate, args=span, name="populator", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until nothing is under way."""
        if self._thread:
            self._thread.join()

    def _populate(self, begin: int, end: int) -> None:
        advise = ctypes.CDLL(None).madvise  # unlike the method of `mmap` it lets other threads run meanwhile
        advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for offset in range(begin - begin % _PAGE, end, _PAGE):
            for memory in self._memories:
                if advise(address(memory) + offset, min(_PAGE, len(memory) - offset), _POPULATE_WRITE):
                    return
