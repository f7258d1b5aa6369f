"""What this machine does in a second, measured in a few seconds: products of matrices, copies, a disk."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..accelerator.process_memory import resident_bytes
from ..memory.heap import give_back_holes
from ..native.file_engine import QueueOptions
from ..native.files import aligned_empty
from .nvme_bench import measure

DISK_NBYTES = 256 << 20


def multiplication_rate(dtype: torch.dtype, *, rows: int = 256, width: int = 2048) -> float:
    """Floating-point operations per second of (rows, width) x (width, 4 * width)."""
    inputs, weight = torch.randn(rows, width).to(dtype), torch.randn(4 * width, width).to(dtype)
    return 2 * rows * width * 4 * width * _calls_per_second(lambda: torch.nn.functional.linear(inputs, weight))


def base_bytes() -> int:
    """What Python and libraries take in this process, once the libraries have allocated what they work in."""
    multiplication_rate(torch.float32, width=1024)
    give_back_holes()
    return resident_bytes()


def copy_rate(nbytes: int = 256 << 20) -> float:
    """Bytes of memory copied per second."""
    source, target = torch.zeros(nbytes // 4), torch.zeros(nbytes // 4)
    return nbytes * _calls_per_second(lambda: target.copy_(source))


def disk_rates(folder: Path, options: QueueOptions) -> tuple[float, float]:
    """Bytes per second that the disk of ``folder`` reads and writes."""
    memory = aligned_empty(DISK_NBYTES, torch.uint8).random_()
    with tempfile.NamedTemporaryFile(dir=folder, prefix="deepspeed-rates-") as file:
        rates, _ = measure(file.name, memory, [options], rounds=2)
    read, write = rates[options].medians
    return read * 1e9, write * 1e9


def _calls_per_second(call: Callable[[], object], *, seconds: float = 0.4) -> float:
    call()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        call()
        count += 1
    return count / (time.perf_counter() - begin)
