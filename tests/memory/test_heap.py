from __future__ import annotations

import pytest
import torch
from benchmarks.measure import resident_bytes

from deepspeed.memory.heap import FreedMemory, _malloc_trim

MEGABYTE = 1 << 20


@pytest.mark.skipif(_malloc_trim() is None, reason="only glibc keeps holes that it can be asked to give back")
def test_holes_between_what_stays_are_given_back_when_they_reach_the_limit() -> None:
    larger = torch.ones(2 * MEGABYTE, dtype=torch.uint8)
    del larger  # From now on pieces of this size come from the heap.
    pieces = [torch.ones(MEGABYTE, dtype=torch.uint8) for _ in range(100)]
    freed = FreedMemory(limit=60 * MEGABYTE)
    pieces = pieces[1::2]
    holes = resident_bytes()
    freed.add(50 * MEGABYTE)
    assert resident_bytes() > holes - 10 * MEGABYTE
    freed.add(11 * MEGABYTE)
    assert resident_bytes() < holes - 40 * MEGABYTE
    assert all(bool((piece == 1).all()) for piece in pieces)
