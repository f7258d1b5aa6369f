"""The documented names of ``deepspeed.runtime.zero.offload_config``."""

from __future__ import annotations

from ...zero.presence import OffloadDeviceEnum, OffloadStateTypeEnum

__all__ = ["OffloadDeviceEnum", "OffloadStateTypeEnum"]
