"""Optimizers, learning-rate schedules, loss scaling, and how an optimizer steps over slices."""

from __future__ import annotations

from .build import build_optimizer
from .schedules import build_scheduler

__all__ = ["build_optimizer", "build_scheduler"]
