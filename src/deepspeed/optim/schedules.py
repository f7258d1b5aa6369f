"""Warm-up learning-rate schedules, with the parameters and formulas of the configuration's documentation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler


class WarmupLR(LRScheduler):
    """Raise the rate from ``warmup_min_lr`` to ``warmup_max_lr`` in ``warmup_num_steps`` steps, then keep it."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_min_lr: float = 0.0,
        warmup_max_lr: float = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: Literal["log", "linear"] = "log",
        last_batch_iteration: int = -1,
    ):
        if warmup_type not in ("log", "linear"):
            raise ValueError(f"warmup_type is 'log' or 'linear', got {warmup_type!r}")
        self.minimum = warmup_min_lr
        self.maximum = warmup_max_lr
        self.warmup_steps = max(2, int(warmup_num_steps))
        self.warmup_type = warmup_type
        super().__init__(optimizer, last_batch_iteration)

    def get_lr(self) -> list[float]:
        """The rate of each parameter group at the present step."""
        return [self._rate(self.last_epoch) for _ in self.optimizer.param_groups]

    def _rate(self, step: int) -> float:
        return self.minimum + (self.maximum - self.minimum) * self._warmth(step) * self._decay(step)

    def _warmth(self, step: int) -> float:
        if step >= self.warmup_steps:
            return 1.0
        if self.warmup_type == "log":
            return math.log(step + 1) / math.log(self.warmup_steps)
        return step / self.warmup_steps

    def _decay(self, step: int) -> float:
        return 1.0


class WarmupDecayLR(WarmupLR):
    """As :class:`WarmupLR`, then down to ``warmup_min_lr`` in a straight line, at ``total_num_steps``."""

    def __init__(self, optimizer: torch.optim.Optimizer, total_num_steps: int, **warmup: Any):
        self.total_steps = int(total_num_steps)
        super().__init__(optimizer, **warmup)

    def _decay(self, step: int) -> float:
        if step < self.warmup_steps:
            return 1.0
        return max(0.0, (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps))


class WarmupCosineLR(LRScheduler):
    """Raise each group's rate from ``warmup_min_ratio`` of it, then lower it along a cosine to ``cos_min_ratio``."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: Literal["log", "linear"] = "log",
    ):
        if warmup_type not in ("log", "linear"):
            raise ValueError(f"warmup_type is 'log' or 'linear', got {warmup_type!r}")
        self.total_steps = int(total_num_steps)
        self.warmup_steps = max(2, int(warmup_num_steps))
        self.warmup_ratio = warmup_min_ratio
        self.cosine_ratio = cos_min_ratio
        self.warmup_type = warmup_type
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """The rate of each parameter group at the present step."""
        return [base * self._ratio(self.last_epoch) for base in self.base_lrs]

    def _ratio(self, step: int) -> float:
        if step < self.warmup_steps:
            linear = step / self.warmup_steps
            warmth = linear if self.warmup_type == "linear" else math.log(step + 1) / math.log(self.warmup_steps)
            return self.warmup_ratio + (1.0 - self.warmup_ratio) * warmth
        past = (step - self.warmup_steps + 1) / max(1, self.total_steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(1.0, past))) / 2
        return self.cosine_ratio + (1.0 - self.cosine_ratio) * cosine


SCHEDULES = {kind.__name__: kind for kind in (WarmupLR, WarmupDecayLR, WarmupCosineLR)}


def build_scheduler(kind: str, params: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The schedule that the configuration names."""
    try:
        return SCHEDULES[kind](optimizer, **params)
    except TypeError as error:
        raise ValueError(f"scheduler.params of {kind}: {error}") from error
