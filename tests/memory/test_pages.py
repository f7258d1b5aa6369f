from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from deepspeed.memory.pages import HUGE_NBYTES, prefer_huge_pages

SMAPS = Path("/proc/self/smaps")


def flags_at(address: int) -> list[str]:
    """What the system notes of the memory in which ``address`` lies."""
    within = False
    for line in SMAPS.read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(edge, 16) for edge in first.split("-"))
            within = start <= address < end
        elif within and first == "VmFlags:":
            return rest
    return []


@pytest.mark.skipif(sys.platform != "linux" or not SMAPS.exists(), reason="Linux tells of its pages")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages")
def test_huge_pages_are_asked_for_within_a_large_tensor_alone() -> None:
    values = torch.arange(8 * HUGE_NBYTES // 8)
    first = -(-values.data_ptr() // HUGE_NBYTES) * HUGE_NBYTES
    prefer_huge_pages(values)
    assert "hg" in flags_at(first) and "hg" in flags_at(first + 6 * HUGE_NBYTES)
    assert first == values.data_ptr() or "hg" not in flags_at(values.data_ptr())
    assert torch.equal(values, torch.arange(values.numel()))
    small = torch.ones(HUGE_NBYTES, dtype=torch.uint8)
    prefer_huge_pages(small)
    assert "hg" not in flags_at(small.data_ptr()) and bool((small == 1).all())
