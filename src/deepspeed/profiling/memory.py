"""How much memory is in use now, for the log."""

from __future__ import annotations

from ..accelerator import get_accelerator
from ..accelerator.process_memory import available_bytes, resident_bytes, total_bytes
from ..logs import log_dist

_GB = 1e9


def memory_line(message: str) -> str:
    """``message`` with the device's memory in use and at its peak, the process's resident set, and the machine's."""
    accelerator = get_accelerator()
    used = total_bytes() - available_bytes()
    return (
        f"{message} | {accelerator.current_device_name()} {accelerator.memory_allocated() / _GB:.2f} GB, peak "
        f"{accelerator.max_memory_allocated() / _GB:.2f} GB | process {resident_bytes() / _GB:.2f} GB | machine "
        f"{used / _GB:.2f} of {total_bytes() / _GB:.2f} GB"
    )


def see_memory_usage(message: str, force: bool = False, ranks: list[int] | None = None) -> None:
    """Log ``message`` with the memory in use now (:func:`memory_line`) on the global ``ranks``, rank 0 where None.

    Calls can stay in a program for good: without ``force`` they do nothing.
    """
    if force:
        log_dist(memory_line(message), ranks=[0] if ranks is None else ranks)
