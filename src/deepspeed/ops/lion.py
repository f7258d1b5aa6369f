"""The documented names of ``deepspeed.ops.lion``."""

from __future__ import annotations

from ..optim.documented import DeepSpeedCPULion, FusedLion

__all__ = ["DeepSpeedCPULion", "FusedLion"]
