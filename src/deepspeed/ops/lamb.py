"""The documented names of ``deepspeed.ops.lamb``."""

from __future__ import annotations

from ..optim.documented import FusedLamb

__all__ = ["FusedLamb"]
