"""What device this process computes on, and what it can do."""

from __future__ import annotations

from .accelerator import Accelerator, get_accelerator, is_current_accelerator_supported

__all__ = ["Accelerator", "get_accelerator", "is_current_accelerator_supported"]
