"""The documented names of ``deepspeed.runtime.zero.partition_parameters``."""

from __future__ import annotations

from ...accelerator import get_accelerator
from ...zero import GatheredParameters, Init, ZeroParamStatus
from ...zero.constructors import _orig_torch_arange, zero_wrapper_for_fp_tensor_constructor

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "_orig_torch_arange",
    "get_accelerator",
    "zero_wrapper_for_fp_tensor_constructor",
]
