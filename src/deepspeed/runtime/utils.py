"""The documented names of ``deepspeed.runtime.utils``."""

from __future__ import annotations

from ..accelerator.placement import move_to_device
from ..profiling.memory import see_memory_usage

__all__ = ["move_to_device", "see_memory_usage"]
