"""The documented modules of ``deepspeed.ops``."""

from __future__ import annotations

from . import adagrad, adam, lamb, lion

__all__ = ["adagrad", "adam", "lamb", "lion"]
