"""Batches without end, from any place on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DistributedSampler


class ResumableSampler(DistributedSampler[Any]):
    """A DistributedSampler whose next iteration leaves out its first ``skipped`` samples."""

    skipped = 0

    def __iter__(self) -> Iterator[Any]:
        first, self.skipped = self.skipped, 0
        return islice(super().__iter__(), first, None)


class RepeatingLoader:
    """An iterator over ``loader`` that starts it again when it ends: for a number of steps rather than of epochs.

    A sampler that shuffles by epoch (``DistributedSampler``) is told the epoch, so that each has its own order.
    Raises ValueError for a loader without batches.
    """

    def __init__(self, loader: Iterable[Any]):
        self.loader = loader
        self.epoch = 0
        self._taken = 0
        self._batches = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except StopIteration:
            self.epoch += 1
            self._start(skipped=0)
            try:
                batch = next(self._batches)
            except StopIteration:
                raise ValueError(f"the {type(self.loader).__name__} to repeat has no batches") from None
        self._taken += 1
        return batch

    def position(self) -> dict[str, int]:
        """Where the next batch comes from: the epoch, and the samples of it that all ranks together have had."""
        return {"epoch": self.epoch, "samples": self._taken * self._samples_of_a_batch()}

    def go_to(self, epoch: int, samples: int) -> None:
        """Go on from a ``position``, of any number of ranks and size of batches."""
        self.epoch = epoch
        self._start(skipped=samples // self._samples_of_a_batch())

    def _start(self, skipped: int) -> None:
        """Begin the epoch, but for its first ``skipped`` batches: they are not loaded where the sampler can leave them out."""
        sampler = getattr(self.loader, "sampler", None)
        set_epoch = getattr(sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.epoch)
        if isinstance(sampler, ResumableSampler):
            sampler.skipped = skipped * self.loader.batch_size  # type: ignore[attr-defined]
        self._batches = iter(self.loader)
        for _ in range(0 if isinstance(sampler, ResumableSampler) else skipped):
            next(self._batches, None)
        self._taken = skipped

    def _samples_of_a_batch(self) -> int:
        """Over all ranks; a batch counts as one sample where the loader does not say."""
        ranks = getattr(getattr(self.loader, "sampler", None), "num_replicas", 1)
        return int((getattr(self.loader, "batch_size", None) or 1) * ranks)
