"""What this machine offers to ranks: accelerators and cores."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import LaunchError

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def accelerator_count() -> int:
    """Accelerators that ranks can use: 0 means CPU ranks. ``DS_ACCELERATOR=cpu`` hides them."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    if hasattr(torch, "accelerator"):
        return torch.accelerator.device_count()
    return torch.cuda.device_count()


def available_cores() -> list[int]:
    """The cores this process may run on, fewer where a container's CPU quota grants less than that many."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return cores[: _quota() or len(cores)]


def _quota() -> int | None:
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or the word "max": no quota
        return None


def core_shares(cores: list[int], ranks: int) -> list[list[int]]:
    """Contiguous, disjoint, equal shares of ``cores``, one per rank; with fewer cores than ranks, ranks take turns."""
    share = len(cores) // ranks
    if share == 0:
        return [[cores[rank % len(cores)]] for rank in range(ranks)]
    return [cores[rank * share : (rank + 1) * share] for rank in range(ranks)]


def parse_range_list(rng_str: str) -> list[int]:
    """The cores in ``1,3-5,7``, sorted: ``[1, 3, 4, 5, 7]``. Raises LaunchError for anything else, or a core twice."""
    cores: list[int] = []
    for part in rng_str.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise LaunchError(f"core list {rng_str!r}: {part!r} is neither a core nor a range such as 3-5")
        cores += range(int(first), int(last or first) + 1)
    if len(set(cores)) < len(cores):
        raise LaunchError(f"core list {rng_str!r} names a core twice; name each once")
    return sorted(cores)
