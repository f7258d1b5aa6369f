"""The documented modules of ``deepspeed.ops``."""

from __future__ import annotations

from ..native.documented import COMPATIBLE_OPS as __compatible_ops__
from . import adagrad, adam, aio, lamb, lion, op_builder

__all__ = ["__compatible_ops__", "adagrad", "adam", "aio", "lamb", "lion", "op_builder"]
