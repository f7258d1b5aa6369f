"""Pages of memory that is written for the first time: large ones cost a tenth of the time of small ones."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

HUGE_NBYTES = 2 << 20
"""Bytes of a huge page of Linux on most processors; elsewhere the system takes what fits."""

_MADV_HUGEPAGE = 14


def prefer_huge_pages(tensor: Tensor) -> None:
    """Ask the system for huge pages where ``tensor`` has none yet: whole ones alone, so that no byte more is resident.

    To be called before the first write, on a tensor that is to be written whole. Does nothing but for CPU memory on Linux.
    """
    advise = _madvise() if tensor.device.type == "cpu" else None
    if advise is None or tensor.nbytes < 2 * HUGE_NBYTES:
        return
    start = -(-tensor.data_ptr() // HUGE_NBYTES) * HUGE_NBYTES
    end = (tensor.data_ptr() + tensor.nbytes) // HUGE_NBYTES * HUGE_NBYTES
    # A system that has none refuses, and its small ones do.
    advise(start, end - start, _MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
