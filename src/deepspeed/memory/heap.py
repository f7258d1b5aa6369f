"""What was freed, and stays with the process all the same: the holes in the C library's heap."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


class FreedMemory:
    """Gives holes back to the system whenever ``limit`` bytes have been freed since the last time.

    glibc takes large pieces from the system one by one, but no longer those of a size that it was once given back: such
    pieces come from its heap, whose holes stay resident. Where tensors come and go between others that stay, that grows
    to a large part of what stays. Under another C library this does nothing.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._nbytes = 0

    def add(self, nbytes: int) -> None:
        """So many bytes have been freed."""
        self._nbytes += nbytes
        if self._nbytes > self._limit:
            self.give_back()

    def give_back(self) -> None:
        """Give holes back now."""
        self._nbytes = 0
        give_back_holes()


def give_back_holes() -> None:
    """Give the holes in the heap back to the system, where something large ends that left many."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError: on Windows there is no library of this name.
        return None
