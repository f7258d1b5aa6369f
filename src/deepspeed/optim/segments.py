"""Segments: what an optimizer's parameter groups hold in place of parameters.

A *segment* is a contiguous part of a slice whose parameters have taken the same steps, so that one step number, and what
other numbers an optimizer keeps beside its elementwise states, is right for all of them. A slice is one segment until
a step in which some of its parameters get a gradient and others get none: it is cut between them, its states too, and a
segment without gradients is left alone, as a plain optimizer leaves alone a parameter whose ``grad`` is None.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..memory.layout import Bucket, Fragment


@dataclass(frozen=True)
class FlatShard:
    """``tensor`` (1-D, at least fp32) is ``shard``'s slice of ``bucket``."""

    tensor: Tensor
    bucket: Bucket
    shard: int

    @cached_property
    def fragments(self) -> tuple[Fragment, ...]:
        """The parts of parameters of which the slice is made."""
        return self.bucket.fragments(self.shard)


@dataclass(frozen=True, eq=False)
class Segment:
    """``tensor`` is ``shard``'s slice from ``start`` on, as far as ``fragments`` and the gaps behind them reach."""

    tensor: Tensor
    shard: FlatShard
    start: int
    fragments: tuple[Fragment, ...]

    @property
    def where(self) -> slice:
        """The segment's elements within the slice, as an index."""
        return slice(self.start, self.start + self.tensor.numel())

    def part(self, fragment: Fragment) -> slice:
        """The elements of the segment that are ``fragment``'s, as an index."""
        start = fragment.slice_start - self.start
        return slice(start, start + fragment.numel)

    def idle(self, unused: Collection[str]) -> bool:
        """Whether all its parameters are in ``unused``. Padding alone is not idle."""
        return bool(self.fragments) and all(fragment.spec.name in unused for fragment in self.fragments)


class Segments:
    """The segments of a rank's slices, and ``optimizer``, whose parameter groups hold them: those of a bucket are in the
    group of the bucket. ``shards`` is in the order of the buckets."""

    def __init__(self, optimizer: torch.optim.Optimizer, shards: Sequence[FlatShard]):
        self.optimizer = optimizer
        self.shards: tuple[FlatShard, ...] = ()
        self._of: list[list[Segment]] = []
        self.extend(shards)

    def __iter__(self) -> Iterator[Segment]:
        for segments in self._of:
            yield from segments

    def of(self, shard: FlatShard) -> Sequence[Segment]:
        """The segments of a slice, in order."""
        return self._of[shard.bucket.index]

    def holding(self, tensor: Tensor) -> Segment | None:
        """The segment that ``tensor``, a member of a parameter group, is; None where it is none."""
        return self._by_tensor.get(tensor)

    def extend(self, shards: Sequence[FlatShard]) -> None:
        """Hold the slices of further buckets too."""
        self.shards = (*self.shards, *shards)
        self._of += [[Segment(shard.tensor, shard, 0, shard.fragments)] for shard in shards]
        self._fill_groups()

    def separate(self, shard: FlatShard, unused: Collection[str]) -> None:
        """Cut a slice where a parameter in ``unused`` meets one that is not, and its states likewise."""
        segments = self._of[shard.bucket.index]
        finer = []
        for segment in segments:
            parts = _split(segment, cuts(segment.fragments, lambda fragment: fragment.spec.name in unused))
            finer += parts
            if len(parts) > 1:
                self._split_state(segment, parts)
        if len(finer) > len(segments):
            segments[:] = finer
            self._fill_groups()

    def recut(self, shard: FlatShard, starts: Sequence[int]) -> Sequence[Segment]:
        """Cut a slice anew at the elements ``starts``, and forget its states."""
        segments = self._of[shard.bucket.index]
        for segment in segments:
            self.optimizer.state.pop(segment.tensor, None)
        segments[:] = _split(Segment(shard.tensor, shard, 0, shard.fragments), starts)
        self._fill_groups()
        return segments

    def _split_state(self, segment: Segment, parts: Sequence[Segment]) -> None:
        state: dict[str, Any] = self.optimizer.state.pop(segment.tensor, {})
        for part in parts if state else ():
            where = slice(part.start - segment.start, part.start - segment.start + part.tensor.numel())
            self.optimizer.state[part.tensor] = {
                key: value[where] if is_elementwise(value, segment.tensor) else copy.deepcopy(value)
                for key, value in state.items()
            }

    def _fill_groups(self) -> None:
        self._by_tensor = {segment.tensor: segment for segment in self}
        for index, group in enumerate(self.optimizer.param_groups):
            group["params"] = [segment.tensor for segment in self if segment.shard.bucket.group == index]
        for replaced in [tensor for tensor in self.optimizer.state if tensor not in self._by_tensor]:
            del self.optimizer.state[replaced]
        if isinstance(self.optimizer, torch.optim.Adagrad):
            _give_adagrad_its_states(self.optimizer)


def is_elementwise(value: object, tensor: Tensor) -> bool:
    """Whether a state of ``tensor`` has one value for each of its elements."""
    return isinstance(value, Tensor) and value.shape == tensor.shape


def cuts(fragments: Sequence[Fragment], key: Callable[[Fragment], object]) -> list[int]:
    """The elements of the slice at which ``key`` changes from one fragment to the next."""
    return [after.slice_start for before, after in pairwise(fragments) if key(before) != key(after)]


def _split(segment: Segment, starts: Sequence[int]) -> list[Segment]:
    if not starts:
        return [segment]
    edges = [segment.start, *starts, segment.where.stop]
    return [
        Segment(
            segment.shard.tensor[start:stop],
            segment.shard,
            start,
            tuple(fragment for fragment in segment.fragments if start <= fragment.slice_start < stop),
        )
        for start, stop in pairwise(edges)
    ]


def _give_adagrad_its_states(optimizer: torch.optim.Adagrad) -> None:
    """Those that it makes at construction, for the parameters that it has then, and expects to find."""
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            if not optimizer.state[tensor]:
                initial = torch.full_like(tensor, group["initial_accumulator_value"])
                optimizer.state[tensor] = {"step": torch.tensor(0.0), "sum": initial}
