"""Tensors made ready to be saved."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """``item`` (a tensor, or nested dicts, lists and tuples) with every tensor cloned to ``device``.

    ``torch.save`` writes the whole storage of a tensor that is a view of it, as the parameters of an engine are: their
    clones are as large as they look. Tensors that were one (tied weights) stay one; everything else is kept as it is.
    """
    return _cloned(item, torch.device(device), {})


def _cloned(item: Any, device: torch.device, clones: dict[Any, Tensor]) -> Any:
    if isinstance(item, Tensor):
        key = (item.data_ptr(), item.dtype, item.shape, item.stride()) if item.numel() else id(item)
        if key not in clones:
            clones[key] = item.detach().clone().to(device)
        return clones[key]
    if isinstance(item, dict):
        result = copy.copy(item)
        result.update((key, _cloned(value, device, clones)) for key, value in item.items())
        return result
    if isinstance(item, (list, tuple)):
        values = [_cloned(value, device, clones) for value in item]
        return type(item)(*values) if hasattr(item, "_fields") else type(item)(values)
    return item
