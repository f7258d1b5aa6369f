"""Putting tensors on devices: as they are made, or a nest of them at once."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class OnDevice:
    """Within this context new floating-point tensors, those of modules included, have ``dtype`` and are on ``device``.

    On ``meta`` they have no memory: a way to build a model that does not fit. ``enabled`` False changes nothing.
    """

    def __init__(self, dtype: torch.dtype, device: str | torch.device = "meta", enabled: bool = True):
        self.dtype = dtype
        self.device = torch.device(device)
        self.enabled = enabled
        self._exit = ExitStack()

    def __enter__(self) -> OnDevice:
        if self.enabled:
            self._exit.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self.dtype)
            self._exit.enter_context(self.device)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._exit.close()


def move_to_device(item: Any, device: str | torch.device) -> Any:
    """``item`` (a tensor, or nested lists, tuples and dicts) with every tensor on ``device``; the rest as it is."""
    if isinstance(item, Tensor):
        return item.to(device)
    if isinstance(item, dict):
        return {key: move_to_device(value, device) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        values = [move_to_device(value, device) for value in item]
        return type(item)(*values) if hasattr(item, "_fields") else type(item)(values)
    return item
