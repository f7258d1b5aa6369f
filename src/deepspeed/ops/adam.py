"""The documented names of ``deepspeed.ops.adam``."""

from __future__ import annotations

from ..optim.documented import DeepSpeedCPUAdam, FusedAdam

__all__ = ["DeepSpeedCPUAdam", "FusedAdam"]
