"""The memory of this process and machine, in bytes, as the operating system counts it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """The resident set: what of this process is in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The largest resident set since the process started or the peak was reset."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    # In kilobytes everywhere but on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak() -> None:
    """Measure the peak from now on. Raises OSError where the operating system cannot (Linux can, since 4.0)."""
    if not _CLEAR_REFS.exists():
        raise OSError("this operating system cannot reset the peak of a process's resident memory")
    _CLEAR_REFS.write_text("5")


def total_bytes() -> int:
    """The machine's memory."""
    return int(psutil.virtual_memory().total)


def available_bytes() -> int:
    """What of the machine's memory new work can have without swapping."""
    return int(psutil.virtual_memory().available)
