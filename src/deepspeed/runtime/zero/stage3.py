"""The documented names of ``deepspeed.runtime.zero.stage3``."""

from __future__ import annotations

from ...memory.estimate import estimate_zero3_model_states_mem_needs
from ...memory.estimate_report import (
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)

__all__ = [
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
]
