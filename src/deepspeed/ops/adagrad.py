"""The documented names of ``deepspeed.ops.adagrad``."""

from __future__ import annotations

from ..optim.documented import DeepSpeedCPUAdagrad

__all__ = ["DeepSpeedCPUAdagrad"]
