"""The documented names of ``deepspeed.runtime.zero.config``."""

from __future__ import annotations

from ...config.offload import OffloadOptimizerConfig as DeepSpeedZeroOffloadOptimizerConfig
from ...config.offload import OffloadParamConfig as DeepSpeedZeroOffloadParamConfig
from ...config.zero import ZeroConfig as DeepSpeedZeroConfig

__all__ = ["DeepSpeedZeroConfig", "DeepSpeedZeroOffloadOptimizerConfig", "DeepSpeedZeroOffloadParamConfig"]
