"""A pool of buffers that are lent for a short while: memory that was touched once is not faulted in again."""

from __future__ import annotations

import torch
from torch import Tensor

from .pages import prefer_huge_pages


class BufferPool:
    """Lends 1-D tensors. What comes back is lent again, to whoever asks for no more than its size; where nothing that
    is free is large enough, a smaller one makes way, so that no more buffers stay than were lent at once."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}

    def take(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of ``numel`` elements with undefined content."""
        free = self._free.setdefault((dtype, device), [])
        fitting = [index for index, buffer in enumerate(free) if buffer.numel() >= numel]
        if fitting:
            return free.pop(min(fitting, key=lambda index: free[index].numel()))[:numel]
        if free:
            free.pop(min(range(len(free)), key=lambda index: free[index].numel()))
        buffer = torch.empty(numel, dtype=dtype, device=device)
        prefer_huge_pages(buffer)
        return buffer

    def give_back(self, tensor: Tensor) -> None:
        """Return a tensor that ``take`` lent; it must not be used any more."""
        numel = tensor.untyped_storage().nbytes() // tensor.element_size()
        self._free.setdefault((tensor.dtype, tensor.device), []).append(tensor.as_strided((numel,), (1,), 0))

    def release(self) -> None:
        """Free the buffers that are not lent."""
        self._free.clear()
