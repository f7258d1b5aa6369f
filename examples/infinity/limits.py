"""How fast this machine could take a step: what its disk and its processor can do, measured."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from deepspeed.cli.nvme_bench import measure
from deepspeed.config.offload import AioConfig
from deepspeed.memory.files import queue_options
from deepspeed.native.files import aligned_empty

READ, WRITTEN = 24, 16
"""Bytes of a step for each parameter. Forward and backward read it; its gradient is written; the optimizer reads parameter,
gradient and two moments, and writes all but the gradient."""

PRODUCTS = 8
"""Floating-point operations of a step for each parameter and token: 2 in forward, 2 again when backward computes the layer
anew, and 4 in backward."""


@dataclass(frozen=True)
class Limits:
    """``read`` and ``write`` in bytes per second, ``multiply`` in floating-point operations per second."""

    read: float
    write: float
    multiply: float

    def disk_seconds(self, parameters: int) -> float:
        """The least time in which the disk moves what a step of so many parameters moves."""
        return parameters * (READ / self.read + WRITTEN / self.write)

    def arithmetic_seconds(self, parameters: int, tokens: int) -> float:
        """The least time in which the processor multiplies what a step multiplies."""
        return PRODUCTS * parameters * tokens / self.multiply


def measure_limits(folder: Path, aio: dict[str, Any], *, tokens: int, width: int) -> Limits:
    """Measure the disk of ``folder`` with the section ``aio``, and products of the model's shape."""
    memory = aligned_empty(256 << 20, torch.uint8).random_()
    options = queue_options(AioConfig(**aio))
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        rates, _ = measure(file.name, memory, [options], rounds=2)
    read, write = rates[options].medians
    return Limits(read * 1e9, write * 1e9, multiplication_rate(tokens, width))


def multiplication_rate(tokens: int, width: int, *, seconds: float = 0.5) -> float:
    """Operations per second of the largest layer's product, (tokens, width) x (width, 4 * width)."""
    inputs, weight = torch.randn(tokens, width), torch.randn(4 * width, width)
    linear(inputs, weight)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        linear(inputs, weight)
        count += 1
    return count * 2 * tokens * width * 4 * width / (time.perf_counter() - begin)
