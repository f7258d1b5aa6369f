"""A tier in memory itself: where numbers are packed while nobody computes with them.

As on a file, the memory of a tensor is freed and allocated again, never replaced, and a chunk says when. What is packed may
lie on a file in turn. Here packing is computing: it is done at once, and only the file's part goes on beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..native import packing
from .tiers import Evictable, FileTier, id_of


class Packing(Protocol):
    """How the values of a tensor are packed, and where."""

    def below(self) -> Iterator[Evictable]:
        """Those of the packed numbers that lie on a file."""

    def unpack(self, values: Tensor) -> None:
        """Fill ``values``. What is below is in memory."""

    def pack(self, values: Tensor) -> None:
        """Take over ``values``. What is below has memory."""


class PackedEvictable:
    """The memory of ``tensor`` (1-D, its storage's whole), which is there while it is computed with, and else ``packing``'s."""

    def __init__(self, tensor: Tensor, packing: Packing):
        self._dtype = tensor.dtype
        self._storage = tensor.untyped_storage()
        self.nbytes = self._storage.nbytes()
        self._packing = packing
        self._packed = False

    def start_fetch(self) -> None:
        """Begin to read what is packed, where it is on a file."""
        if self._packed:
            for evictable in self._packing.below():
                evictable.start_fetch()

    def fetch(self) -> None:
        """Have the values in memory."""
        if self._packed:
            for evictable in self._packing.below():
                evictable.fetch()
            self.claim()
            self._packing.unpack(self._values())

    def claim(self) -> None:
        """Have memory for values that are about to be overwritten."""
        if self._packed:
            self._storage.resize_(self.nbytes)
            self._packed = False

    def start_evict(self) -> None:
        """Pack the values, and begin to write them where they lie on a file."""
        if not self._packed:
            for evictable in self._packing.below():
                evictable.claim()
            self._packing.pack(self._values())
            self._free()
        for evictable in self._packing.below():
            evictable.start_evict()

    def evict(self) -> None:
        """Have the values packed, and on the file alone where they lie on one."""
        self.start_evict()
        for evictable in self._packing.below():
            evictable.evict()

    def drop(self) -> None:
        """Free the memory of values that are as they were unpacked."""
        if not self._packed:
            self._free()
        for evictable in self._packing.below():
            evictable.drop()

    def _free(self) -> None:
        self._storage.resize_(0)
        self._packed = True

    def _values(self) -> Tensor:
        return torch.empty(0, dtype=self._dtype, device=self._storage.device).set_(self._storage)


class Quantized:
    """fp32 values as block-wise 8-bit numbers, on ``file`` where given."""

    def __init__(self, tensor: Tensor, file: FileTier | None):
        self._numel = tensor.untyped_storage().nbytes() // tensor.element_size()
        self._start = -(-self._numel // 4) * 4  # of the scales, behind the codes
        nbytes = self._start + 4 * packing.block_count(self._numel)
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=tensor.device)
        self._file = file

    def below(self) -> Iterator[Evictable]:
        """The codes and scales, where they lie on a file."""
        if self._file is not None:
            yield self._file.evictable(self.memory)

    def unpack(self, values: Tensor) -> None:
        """Fill ``values``."""
        packing.dequantize(*self._parts(), values)

    def pack(self, values: Tensor) -> None:
        """Take over ``values``."""
        packing.quantize(values, *self._parts())

    def forget(self) -> None:
        """Give up the place in the file."""
        if self._file is not None:
            self._file.forget(self.memory)

    def _parts(self) -> tuple[Tensor, Tensor]:
        return self.memory[: self._numel], self.memory[self._start :].view(torch.float32)


class QuantizingTier:
    """Holds the memory of fp32 tensors as 8-bit numbers, these on ``file`` where given; other tensors go to the file alone.
    As a :class:`FileTier`, it has an evictable for each storage."""

    def __init__(self, file: FileTier | None):
        self._file = file
        self._known: dict[int, tuple[PackedEvictable, Quantized]] = {}

    def evictable(self, tensor: Tensor) -> Evictable | PackedEvictable | None:
        """The evictable that is the memory of ``tensor``; None for one that stays in memory."""
        if tensor.dtype != torch.float32:
            return self._file.evictable(tensor) if self._file is not None else None
        key = id_of(tensor.untyped_storage())
        if key not in self._known:
            quantized = Quantized(tensor, self._file)
            self._known[key] = PackedEvictable(tensor, quantized), quantized
        return self._known[key][0]

    def forget(self, tensor: Tensor) -> None:
        """Give up the packed values of ``tensor``, which is needed no more."""
        known = self._known.pop(id_of(tensor.untyped_storage()), None)
        if known is not None:
            known[1].forget()
        elif self._file is not None:
            self._file.forget(tensor)

    def tensors(self) -> list[Tensor]:
        """The packed numbers."""
        return [quantized.memory for _, quantized in self._known.values()]


class Split:
    """fp32 masters as the low halves of their bits, on ``file`` where given: the upper halves are what ``high`` returns, the
    bf16 parameters themselves, whose place on a file is ``high_below``'s."""

    def __init__(
        self,
        master: Tensor,
        high: Callable[[], Tensor],
        high_below: Callable[[], list[Evictable]],
        file: FileTier | None,
    ):
        self.low = torch.empty(master.numel(), dtype=torch.int16, device=master.device)
        self.ties = torch.empty(0, dtype=torch.int64)
        self._high = high
        self._high_below = high_below
        self._file = file

    def below(self) -> Iterator[Evictable]:
        """The halves that lie on files."""
        yield from self._high_below()
        if self._file is not None:
            yield self._file.evictable(self.low)

    def unpack(self, values: Tensor) -> None:
        """Put the halves together."""
        packing.merge(self._high(), self.low, self.ties, values)

    def pack(self, values: Tensor) -> None:
        """Split ``values``: the parameters are these, rounded."""
        self.ties = packing.split(values, self._high(), self.low)
