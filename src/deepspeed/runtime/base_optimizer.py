"""The documented names of ``deepspeed.runtime.base_optimizer``."""

from __future__ import annotations

from ..zero.optimizer import DeepSpeedOptimizer

__all__ = ["DeepSpeedOptimizer"]
