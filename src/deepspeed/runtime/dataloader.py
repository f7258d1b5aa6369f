"""The documented names of ``deepspeed.runtime.dataloader``."""

from __future__ import annotations

from ..engine.loader import RepeatingLoader

__all__ = ["RepeatingLoader"]
