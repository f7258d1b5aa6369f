"""Kernels that run over flat CPU tensors in one pass of memory, and the same in torch where they are not compiled.

``kernels`` decides which runs and checks the tensors; ``reference`` says in plain torch what each kernel means; ``fused`` is
Adam on torch's fused kernel.
"""

from __future__ import annotations

from .kernels import adam_step, available, scaled_sum, squared_norm, status
from .reference import AdamHyper

__all__ = ["AdamHyper", "adam_step", "available", "scaled_sum", "squared_norm", "status"]
