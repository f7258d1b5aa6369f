"""The documented names of ``deepspeed.runtime.zero.parameter_offload``."""

from __future__ import annotations

from ...zero.offload import DeepSpeedZeRoOffload

__all__ = ["DeepSpeedZeRoOffload"]
