"""The documented modules of ``deepspeed.runtime``."""

from __future__ import annotations

from . import activation_checkpointing, base_optimizer, config, dataloader, engine, lr_schedules, utils, zero

__all__ = ["activation_checkpointing", "base_optimizer", "config", "dataloader", "engine", "lr_schedules", "utils", "zero"]
