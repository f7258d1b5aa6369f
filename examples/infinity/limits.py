"""How fast this machine could take a step: what its disk and its processor can do, measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepspeed.cli.rates import disk_rates, multiplication_rate
from deepspeed.config.offload import AioConfig
from deepspeed.memory.files import queue_options

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
    """Measure the disk of ``folder`` with the section ``aio``, and the largest layer's product."""
    read, write = disk_rates(folder, queue_options(AioConfig(**aio)))
    return Limits(read, write, multiplication_rate(torch.float32, rows=tokens, width=width))
