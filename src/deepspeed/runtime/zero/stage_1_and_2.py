"""The documented names of ``deepspeed.runtime.zero.stage_1_and_2``."""

from __future__ import annotations

from ...memory.estimate import estimate_zero2_model_states_mem_needs
from ...memory.estimate_report import (
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
)
from ...zero.optimizer import ShardedOptimizer as DeepSpeedZeroOptimizer

__all__ = [
    "DeepSpeedZeroOptimizer",
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
]
