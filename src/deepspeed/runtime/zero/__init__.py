"""The documented modules of ``deepspeed.runtime.zero``."""

from __future__ import annotations

from . import config, stage3, stage_1_and_2

__all__ = ["config", "stage3", "stage_1_and_2"]
