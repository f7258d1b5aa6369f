"""Sections ``optimizer`` and ``scheduler``."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from .section import Section


class OptimizerConfig(Section):
    """The optimizer that the engine builds; none where the section is absent."""

    type: str = Field(description="Adam, AdamW, SGD, Adagrad, Lion, LAMB or Muon, in any case.")
    params: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the optimizer.")
    legacy_fusion: bool = Field(False, description="Only for older CUDA kernels; false is the only value with a meaning.")


class SchedulerConfig(Section):
    """The learning-rate schedule that the engine steps after each optimizer step."""

    type: str | None = Field(
        None, description="LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR or WarmupCosineLR."
    )
    params: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the schedule.")
