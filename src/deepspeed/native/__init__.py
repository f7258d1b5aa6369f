"""The compiled core and its Python face; all of it works, more slowly, where nothing is compiled.

Kernels that run over flat CPU tensors in one pass of memory: ``kernels`` decides which runs and checks the tensors,
``reference`` says in plain torch what each kernel means, ``fused`` is Adam on torch's fused kernel. Asynchronous file I/O:
``files`` is its face, ``file_engine`` decides what moves the bytes, ``file_threads`` is what does without the core.
"""

from __future__ import annotations

from .kernels import adagrad_step, adam_step, available, lion_step, scaled_sum, squared_norm, status
from .reference import AdagradHyper, AdamHyper, LionHyper

__all__ = [
    "AdagradHyper",
    "AdamHyper",
    "LionHyper",
    "adagrad_step",
    "adam_step",
    "available",
    "lion_step",
    "scaled_sum",
    "squared_norm",
    "status",
]
