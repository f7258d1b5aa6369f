"""The documented names of ``deepspeed.runtime.engine``."""

from __future__ import annotations

from ..engine.engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]
