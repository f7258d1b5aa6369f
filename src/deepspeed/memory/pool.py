"""A pool of equal buffers that are lent for a short while."""

from __future__ import annotations

import torch
from torch import Tensor


class BufferPool:
    """Lends 1-D tensors. Those of up to ``numel`` elements come back to be lent again before more is allocated; a
    larger one, which is rare, is freed when it comes back."""

    def __init__(self, numel: int, *, dtype: torch.dtype, device: torch.device):
        self._numel = numel
        self._dtype = dtype
        self._device = device
        self._free: list[Tensor] = []

    def take(self, numel: int) -> Tensor:
        """A tensor of ``numel`` elements with undefined content."""
        if self._free and numel <= self._numel:
            return self._free.pop()[:numel]
        return torch.empty(max(numel, self._numel), dtype=self._dtype, device=self._device)[:numel]

    def give_back(self, tensor: Tensor) -> None:
        """Return a tensor that ``take`` lent; it must not be used any more."""
        if tensor.numel() <= self._numel:
            self._free.append(tensor.as_strided((self._numel,), (1,), 0))

    def release(self) -> None:
        """Free the buffers that are not lent."""
        self._free.clear()
