"""``deepspeed inspect``."""

from .checkpoints import inspect_main as main

__all__ = ["main"]
