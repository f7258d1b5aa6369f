"""The documented modules of ``deepspeed.runtime``."""

from __future__ import annotations

from . import base_optimizer, config, dataloader, engine, lr_schedules, utils, zero

__all__ = ["base_optimizer", "config", "dataloader", "engine", "lr_schedules", "utils", "zero"]
