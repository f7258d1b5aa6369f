"""The documented names and modules of ``deepspeed.runtime.zero``."""

from __future__ import annotations

from ...zero import GatheredParameters, Init, ZeroParamStatus
from . import (
    config,
    offload_config,
    offload_states,
    parameter_offload,
    partition_parameters,
    stage3,
    stage_1_and_2,
    tiling,
)

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "config",
    "offload_config",
    "offload_states",
    "parameter_offload",
    "partition_parameters",
    "stage3",
    "stage_1_and_2",
    "tiling",
]
