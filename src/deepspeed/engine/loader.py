"""Batches without end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class RepeatingLoader:
    """An iterator over ``loader`` that starts it again when it ends: for a number of steps rather than of epochs.

    A sampler that shuffles by epoch (``DistributedSampler``) is told the epoch, so that each has its own order.
    Raises ValueError for a loader without batches.
    """

    def __init__(self, loader: Iterable[Any]):
        self.loader = loader
        self.epoch = 0
        self._batches = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except StopIteration:
            self.epoch += 1
        set_epoch = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.epoch)
        self._batches = iter(self.loader)
        try:
            return next(self._batches)
        except StopIteration:
            raise ValueError(f"the {type(self.loader).__name__} to repeat has no batches") from None
