"""What ``zero.Init`` does to torch's tensor constructors, by the names under which Transformers asks: nothing.

Transformers replaces ``zero_wrapper_for_fp_tensor_constructor`` while a model is constructed, to except ``torch.arange``
from it. Here a model's tensors have the dtypes that its code asks for, with and without that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_orig_torch_arange = torch.arange
"""torch's own, as it always is here."""


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., torch.Tensor], target_fp_dtype: torch.dtype, target_device: Any = None
) -> Callable[..., torch.Tensor]:
    """What replaces the constructor ``fn`` within ``Init``: itself."""
    return fn
