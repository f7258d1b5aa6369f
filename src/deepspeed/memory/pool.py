"""A pool of equal buffers that are lent for a short while."""

from __future__ import annotations

import torch
from torch import Tensor


class BufferPool:
    """Lends 1-D tensors of up to ``numel`` elements; what is given back is lent again before more is allocated."""

    def __init__(self, numel: int, *, dtype: torch.dtype, device: torch.device):
        self._numel = numel
        self._dtype = dtype
        self._device = device
        self._free: list[Tensor] = []

    def take(self, numel: int) -> Tensor:
        """A tensor of ``numel`` elements with undefined content."""
        whole = self._free.pop() if self._free else torch.empty(self._numel, dtype=self._dtype, device=self._device)
        return whole[:numel]

    def give_back(self, tensor: Tensor) -> None:
        """Return a tensor that ``take`` lent; it must not be used any more."""
        self._free.append(tensor.as_strided((self._numel,), (1,), 0))

    def release(self) -> None:
        """Free the buffers that are not lent."""
        self._free.clear()
