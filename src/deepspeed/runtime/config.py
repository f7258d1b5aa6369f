"""The documented names of ``deepspeed.runtime.config``."""

from __future__ import annotations

from ..config import DeepSpeedConfig

__all__ = ["DeepSpeedConfig"]
