"""The flat layout: parameters laid end to end in buckets, each bucket cut into equal slices, one per shard.

The nouns, as every room uses them:

- *parameter*: a named tensor of the model, known here by its name, shape, dtype name and optimizer group.
- *unit*: parameters that ZeRO stage 3 gathers and releases together.
- *bucket*: parameters of one group, dtype and unit, end to end, each start aligned, the end padded so that the
  bucket divides evenly. A bucket is the unit of communication and of the optimizer's stream.
- *slice*: the contiguous part of a bucket that one shard (rank) owns; all slices have the same size.
- *placement*: where in its bucket a parameter lies.
- *fragment*: the intersection of a parameter with a slice.

Pure arithmetic, all in elements: no tensors, no processes. Buckets, optimizer shards, checkpoint fragments and
estimates derive from it; none of them computes an offset of its own.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

ALIGNMENT = 32
"""Elements to which each parameter's start is aligned, if no more: 64 bytes at 16 bits, as torch's own CPU allocations are."""


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter as the layout sees it. ``group`` is the index of its optimizer parameter group, ``unit`` that of the
    unit with which it is gathered, None for a parameter that is whole on every rank."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int = 0
    unit: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements (1 for a 0-dim parameter, 0 for an empty one)."""
        return prod(self.shape)


@dataclass(frozen=True)
class Placement:
    """Parameter ``spec`` occupies elements ``[start, stop)`` of its bucket."""

    spec: ParameterSpec
    start: int

    @property
    def stop(self) -> int:
        """One past the parameter's last element in the bucket."""
        return self.start + self.spec.numel


@dataclass(frozen=True)
class Fragment:
    """Elements ``[parameter_start, parameter_start + numel)`` of a flattened parameter, found at ``slice_start``
    of the slice that holds them."""

    spec: ParameterSpec
    parameter_start: int
    slice_start: int
    numel: int

    @property
    def whole(self) -> bool:
        """Whether the fragment is the entire parameter."""
        return self.numel == self.spec.numel

    @property
    def slice_range(self) -> slice:
        """The fragment's elements within its slice, as an index."""
        return slice(self.slice_start, self.slice_start + self.numel)


@dataclass(frozen=True)
class Bucket:
    """Parameters of one group, dtype and unit, end to end, ``numel`` elements in all, padding included."""

    index: int
    group: int
    dtype: str
    unit: int | None
    placements: tuple[Placement, ...]
    numel: int
    shards: int

    @property
    def slice_numel(self) -> int:
        """Elements of one shard's slice."""
        return self.numel // self.shards

    def slice_range(self, shard: int) -> slice:
        """The elements of the bucket that ``shard`` owns, as an index."""
        return slice(shard * self.slice_numel, (shard + 1) * self.slice_numel)

    @cached_property
    def label(self) -> str:
        """What messages call the bucket: its number and the first of its parameters."""
        names = [placement.spec.name for placement in self.placements]
        more = f" and {len(names) - 3} others" if len(names) > 3 else ""
        return f"bucket {self.index} ({', '.join(names[:3])}{more})"

    @cached_property
    def gaps(self) -> tuple[slice, ...]:
        """The elements that belong to no parameter: alignment and padding. They stay zero."""
        edges = [0]
        for placement in self.placements:
            edges += [placement.start, placement.stop]
        edges.append(self.numel)
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return tuple(slice(start, stop) for start, stop in pairs if stop > start)

    def fragments(self, shard: int) -> tuple[Fragment, ...]:
        """The fragments of which ``shard``'s slice is made, in order. Empty parameters have none."""
        owned = self.slice_range(shard)
        first = max(0, bisect_right(self.placements, owned.start, key=lambda placement: placement.start) - 1)
        found = []
        for placement in self.placements[first:]:
            if placement.start >= owned.stop:
                break
            start, stop = max(placement.start, owned.start), min(placement.stop, owned.stop)
            if stop > start:
                found.append(Fragment(placement.spec, start - placement.start, start - owned.start, stop - start))
        return tuple(found)


@dataclass(frozen=True)
class FlatLayout:
    """Parameters in buckets, in the order in which the buckets are communicated."""

    buckets: tuple[Bucket, ...]
    shards: int
    alignment: int = ALIGNMENT

    @staticmethod
    def build(
        parameters: Iterable[ParameterSpec],
        *,
        shards: int,
        bucket_numel: int,
        unit_bucket_numel: int = sys.maxsize,
        alignment: int = ALIGNMENT,
    ) -> FlatLayout:
        """Lay out ``parameters`` (in registration order) for ``shards`` ranks.

        Buckets fill in reverse registration order, which is about the order in which backward produces gradients,
        and close before they would exceed ``bucket_numel`` elements, or in a unit ``unit_bucket_numel``; a larger
        parameter has a bucket of its own. They are ordered by the parameter that completes them. Parameters and slices
        start at multiples of ``alignment`` elements.
        """
        if shards < 1:
            raise ValueError(f"a layout needs at least one shard, got {shards}")
        return FlatLayout((), shards, alignment).extended(
            parameters, bucket_numel=bucket_numel, unit_bucket_numel=unit_bucket_numel
        )

    def extended(
        self, parameters: Iterable[ParameterSpec], *, bucket_numel: int, unit_bucket_numel: int = sys.maxsize
    ) -> FlatLayout:
        """This layout with further ``parameters`` in buckets of their own behind the others, which stay as they are."""
        filling: dict[tuple[int | None, int, str], _Filling] = {}
        buckets: list[_Filling] = []
        for position, spec in enumerate(reversed(list(parameters))):
            key = (spec.unit, spec.group, spec.dtype)
            start = _aligned(filling[key].placements[-1].stop, self.alignment) if key in filling else 0
            limit = bucket_numel if spec.unit is None else unit_bucket_numel
            if key not in filling or start + spec.numel > limit:
                start = 0
                filling[key] = _Filling()
                buckets.append(filling[key])
            filling[key].placements.append(Placement(spec, start))
            filling[key].completed_by = position
        buckets.sort(key=lambda bucket: bucket.completed_by)
        known, multiple = len(self.buckets), self.alignment * self.shards
        further = (_close(index, bucket.placements, self.shards, multiple) for index, bucket in enumerate(buckets, known))
        return FlatLayout((*self.buckets, *further), self.shards, self.alignment)

    def without(self, names: Collection[str]) -> FlatLayout:
        """This layout with gaps where the parameters ``names`` were: the others stay where they are."""

        def thinned(bucket: Bucket) -> Bucket:
            return replace(bucket, placements=tuple(p for p in bucket.placements if p.spec.name not in names))

        return replace(self, buckets=tuple(map(thinned, self.buckets)))

    @cached_property
    def homes(self) -> Mapping[str, tuple[Bucket, Placement]]:
        """For each parameter's name, its bucket and its place there."""
        return {p.spec.name: (bucket, p) for bucket in self.buckets for p in bucket.placements}

    @property
    def numel(self) -> int:
        """Elements of all buckets, padding included."""
        return sum(bucket.numel for bucket in self.buckets)

    @property
    def slice_numel(self) -> int:
        """Elements that one shard owns, padding included."""
        return sum(bucket.slice_numel for bucket in self.buckets)

    @property
    def parameter_numel(self) -> int:
        """Elements of all parameters, without padding."""
        return sum(p.spec.numel for bucket in self.buckets for p in bucket.placements)


@dataclass
class _Filling:
    """A bucket that is being filled. ``completed_by`` is the position, in the order of backward, of its last parameter."""

    placements: list[Placement] = field(default_factory=list)
    completed_by: int = 0


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _close(index: int, placements: list[Placement], shards: int, multiple: int) -> Bucket:
    spec = placements[0].spec
    numel = _aligned(placements[-1].stop, multiple)
    return Bucket(index, spec.group, spec.dtype, spec.unit, tuple(placements), numel, shards)
