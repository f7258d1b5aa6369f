"""The documented names of ``deepspeed.ops.op_builder``."""

from __future__ import annotations

from ..native.documented import AsyncIOBuilder

__all__ = ["AsyncIOBuilder"]
