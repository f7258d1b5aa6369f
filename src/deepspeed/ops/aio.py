"""The documented names of ``deepspeed.ops.aio``."""

from __future__ import annotations

from ..native.documented import AsyncIOBuilder

__all__ = ["AsyncIOBuilder"]
