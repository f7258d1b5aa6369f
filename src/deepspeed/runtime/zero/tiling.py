"""The documented names of ``deepspeed.runtime.zero.tiling``."""

from __future__ import annotations

from ...zero.tiling import TiledLinear, TiledLinearReturnBias

__all__ = ["TiledLinear", "TiledLinearReturnBias"]
