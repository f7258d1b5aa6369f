"""The documented names of ``deepspeed.utils.logging``."""

from __future__ import annotations

from ..logs import log_dist, logger

__all__ = ["log_dist", "logger"]
