"""``deepspeed convert``."""

from .checkpoints import convert_main as main

__all__ = ["main"]
