"""The documented module of ``deepspeed.runtime.activation_checkpointing``."""

from __future__ import annotations

from . import checkpointing

__all__ = ["checkpointing"]
