"""Sections ``optimizer`` and ``scheduler``."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from .section import Section, key


class OptimizerConfig(Section):
    """The optimizer that the engine builds where none is given to ``initialize``."""

    type: str = Field(
        description="Its name, in any case: Adam, AdamW, Lion, Adagrad, Lamb, Muon, or one of torch.optim such as SGD."
    )
    legacy_fusion: bool = key(False, "An old choice among CUDA kernels.")
    params: dict[str, Any] = key({}, 'Its keyword arguments (docs/optimizers.md). "auto" leaves an argument at its default.')


class SchedulerConfig(Section):
    """The learning-rate schedule that the engine builds and steps after each optimizer step."""

    type: str | None = key(None, "Its name, in any case: LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR or WarmupCosineLR.")
    params: dict[str, Any] = key(
        {},
        'Its keyword arguments (docs/optimizers.md). "auto" leaves an argument at its default, but warmup_max_lr '
        "becomes the optimizer's lr.",
    )
