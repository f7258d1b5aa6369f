"""The model's parameters, moved into one flat buffer per bucket.

Each parameter becomes a view of its bucket's buffer, so that a bucket is communicated, stepped and gathered without
copies. Where the optimizer works on another dtype than the model, a *master* copy of the own slice is kept in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..comm.communicator import Communicator
from ..comm.operations import DONE, Pending
from ..memory.layout import Bucket, FlatLayout, Placement
from ..memory.packed import PackedEvictable, QuantizingTier, Split
from ..memory.tiers import Chunk, Evictable, FileTier, Movable
from . import released
from .presence import Presence
from .tiers import IN_MEMORY, Tiers


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the optimizer works on parameters of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def unchanged(dtype: torch.dtype) -> torch.dtype:
    """The master dtype of parameters that no optimizer changes: their own."""
    return dtype


class FlatParameters:
    """Buffers and own slices of parameters.

    ``buffers[i]`` is bucket i's whole buffer in the model's dtype; ``slices[i]`` is this shard's slice of it: a part of
    the buffer, or memory of its own where the bucket belongs to a unit, whose buffer comes and goes. ``masters[i]`` is
    the slice in the dtype of the masters: the same memory where the model itself has that dtype. ``chunks[i]`` is what of
    these lies on ``tiers`` below memory: it is there while somebody reads or changes it. ``settle`` is called before
    parameters change: what was gathered of them must not outlive the change. ``presence`` knows whether they are here.
    """

    def __init__(
        self,
        layout: FlatLayout,
        parameters: Mapping[str, nn.Parameter],
        *,
        shard: int,
        master_dtype: Callable[[torch.dtype], torch.dtype] = at_least_fp32,
        tiers: Tiers = IN_MEMORY,
    ):
        self.layout = layout
        self.parameters = parameters
        self.shard = shard
        self.buffers: list[Tensor] = []
        self.slices: list[Tensor] = []
        self.masters: list[Tensor] = []
        self.chunks: list[Chunk] = []
        self.parameter_tiers: list[FileTier | None] = []
        self.state_tiers: list[FileTier | None] = []
        self.optimizer_tiers: list[FileTier | QuantizingTier | None] = []
        self.splits: dict[int, tuple[PackedEvictable, Split]] = {}
        self.tiers = tiers
        self.settle: Callable[[], None] = lambda: None
        self.presence = Presence()
        self._master_dtype = master_dtype

    def move_in(self, communicator: Communicator) -> Iterator[Bucket]:
        """Copy the parameters into their buckets' buffers, with rank 0's values on every rank, and make them views, one
        bucket after the other: each is complete when it is yielded.

        Masters keep the precision that the parameters came with, also where the model's dtype is narrower. One bucket
        in the masters' dtype is the extra memory. Buckets that are there already stay as they are.
        """
        for bucket in self.layout.buckets[len(self.buffers) :]:
            device = self.parameters[bucket.placements[0].spec.name].device
            dtype: torch.dtype = getattr(torch, bucket.dtype)
            wide = torch.zeros(bucket.numel, dtype=self._master_dtype(dtype), device=device)
            self._collect(bucket, wide, communicator)
            whole = wide.to(dtype)
            own = whole[bucket.slice_range(self.shard)]
            self.parameter_tiers.append(self.tiers.of_parameters(bucket))
            if self.keeps_apart(bucket):
                own = own.clone()
            self.buffers.append(whole)
            self.slices.append(own)
            self.masters.append(own if wide is whole else wide[bucket.slice_range(self.shard)].clone())
            self._make_views(bucket)
            self._add_chunk(bucket)
            self.chunks[-1].evict()
            yield bucket

    def put_in(self, bucket: Bucket, own: Tensor) -> None:
        """Have ``own`` as this shard's slice of a unit's ``bucket``, the next one. The whole buffer is not filled: the unit
        is to be released, and the slice to be evicted once it has values."""
        self.parameter_tiers.append(self.tiers.of_parameters(bucket))
        self.buffers.append(own.new_empty(bucket.numel) if self.keeps_apart(bucket) else own)
        self.slices.append(own)
        self.masters.append(own)
        self._add_chunk(bucket)

    def extend(self, layout: FlatLayout, parameters: Mapping[str, nn.Parameter], communicator: Communicator) -> None:
        """Follow ``layout``, which has ``parameters`` in further buckets, and move these in."""
        self.layout = layout
        self.parameters = {**self.parameters, **parameters}
        for _ in self.move_in(communicator):
            pass

    def _collect(self, bucket: Bucket, wide: Tensor, communicator: Communicator) -> None:
        """Copy the parameters of ``bucket`` into ``wide``. What is sharded already is gathered from its home, which gives
        it up; of anything else, rank 0's values count."""
        parameters = [self.parameters[placement.spec.name] for placement in bucket.placements]
        homes = {id(home): home for p in parameters if (home := released.home_of(p)) is not None}
        for home in homes.values():
            home.hold()
        same_everywhere = all((home := released.home_of(p)) is not None and home.ranks_agree for p in parameters)
        for parameter, place in zip(parameters, bucket.placements, strict=True):
            wide[place.start : place.stop].view(place.spec.shape).copy_(parameter.detach())
            if (home := released.home_of(parameter)) is not None:
                home.give_up(parameter)
        for home in homes.values():
            home.let_go()
        if not same_everywhere:
            communicator.broadcast(wide, purpose=f"broadcast of {bucket.label}").wait()

    def _add_chunk(self, bucket: Bucket) -> None:
        """Let the slice and the master of ``bucket`` move to their tiers."""
        file = self.tiers.of_states(bucket)
        self.state_tiers.append(file)
        self.optimizer_tiers.append(QuantizingTier(file) if self.tiers.quantized_states else file)

        def slices() -> list[Evictable]:
            parameters, own = self.parameter_tiers[bucket.index], self.slices[bucket.index]
            return [parameters.evictable(own)] if parameters is not None and own.numel() else []

        master = self.masters[bucket.index]
        if self.tiers.split_masters and self._can_split(bucket):
            split = Split(master, lambda: self.slices[bucket.index], slices, file)
            self.splits[bucket.index] = PackedEvictable(master, split), split

        def mine() -> list[Movable]:
            states, master = self.state_tiers[bucket.index], self.masters[bucket.index]
            if bucket.index in self.splits:  # first, since packing writes the slice
                return [self.splits[bucket.index][0], *slices()]
            apart = states is not None and master is not self.slices[bucket.index] and master.numel()
            return [*slices(), *([states.evictable(master)] if states is not None and apart else [])]

        self.chunks.append(Chunk())
        self.chunks[-1].include(mine)

    def _can_split(self, bucket: Bucket) -> bool:
        own, master = self.slices[bucket.index], self.masters[bucket.index]
        return own.dtype == torch.bfloat16 and master.dtype == torch.float32 and master.numel() > 0

    def drop_masters(self) -> None:
        """Keep the values in the model's dtype alone, and no file of states."""
        self.splits.clear()
        self.masters = list(self.slices)
        self.state_tiers = [None] * len(self.state_tiers)
        self.optimizer_tiers = [None] * len(self.optimizer_tiers)
        self.tiers = replace(self.tiers, states=None, quantized_states=False, split_masters=False)

    def drop(self, bucket: Bucket) -> None:
        """Free the memory of a unit's ``bucket``, whose parameters have all left."""
        tier = self.parameter_tiers[bucket.index]
        if tier is not None:
            tier.forget(self.slices[bucket.index])
        nothing = self.slices[bucket.index].new_empty(0)
        self.buffers[bucket.index] = self.slices[bucket.index] = self.masters[bucket.index] = nothing

    def lose(self, names: Collection[str]) -> None:
        """Have gaps where the parameters ``names`` were, which are elsewhere now."""
        self.layout = self.layout.without(names)
        self.parameters = {name: p for name, p in self.parameters.items() if name not in names}

    def own_slice(self, bucket: Bucket) -> Tensor:
        """This shard's slice of the bucket, in the model's dtype."""
        return self.slices[bucket.index]

    def keeps_apart(self, bucket: Bucket) -> bool:
        """Whether the slice is not a part of the whole buffer."""
        return bucket.unit is not None and (bucket.shards > 1 or self.parameter_tiers[bucket.index] is not None)

    def has_separate_master(self, bucket: Bucket) -> bool:
        """Whether the bucket's master is a tensor of its own."""
        return self.slices[bucket.index] is not self.masters[bucket.index]

    def view(self, bucket: Bucket, placement: Placement) -> Tensor:
        """The 1-D part of the bucket's buffer that holds a parameter."""
        return self.buffers[bucket.index][placement.start : placement.stop]

    @torch.no_grad()
    def keep(self, parameter: nn.Parameter, bucket: Bucket) -> None:
        """Take this shard's part of the values that ``parameter``, of ``bucket``, has now into slice and master."""
        self.presence.require(f"a change of {bucket.label}")
        for fragment in bucket.fragments(self.shard):
            if self.parameters.get(fragment.spec.name) is parameter:
                start = fragment.parameter_start
                values = parameter.detach().reshape(-1)[start : start + fragment.numel]
                with self.chunks[bucket.index].changing():
                    self.own_slice(bucket)[fragment.slice_range] = values
                    if self.has_separate_master(bucket):
                        self.masters[bucket.index][fragment.slice_range] = values

    @contextmanager
    def detached(self, communicator: Communicator) -> Iterator[None]:
        """Within, each parameter is a tensor of its own with its fp32 value, to be written or replaced (``.data``) at will.
        Afterwards it is a view of its bucket again, or released, and the masters have what was written; where the body
        raises, they stay as they were. ``parameters_from_masters`` then gives the values to the model. Costs the whole
        model in fp32.
        """
        wholes = []
        for bucket, master in zip(self.layout.buckets, self.masters, strict=True):
            whole = master.new_zeros(bucket.numel)
            with self.chunks[bucket.index].reading():
                whole[bucket.slice_range(self.shard)] = master
            if bucket.shards > 1:
                communicator.all_gather(whole, purpose=f"gather of the masters of {bucket.label}").wait()
            wholes.append(whole)
            for placement in bucket.placements:
                value = whole[placement.start : placement.stop].view(placement.spec.shape)
                released.expose(self.parameters[placement.spec.name], value)
        try:
            yield
            for bucket, whole in zip(self.layout.buckets, wholes, strict=True):
                for placement in bucket.placements:
                    value = self.parameters[placement.spec.name].detach()
                    whole[placement.start : placement.stop].view(placement.spec.shape).copy_(value)
                with self.chunks[bucket.index].changing():
                    self.masters[bucket.index].copy_(whole[bucket.slice_range(self.shard)])
        finally:
            for bucket in self.layout.buckets:
                self._take_back(bucket)

    def masters_from_parameters(self) -> None:
        """Overwrite the separate masters with the model's present values, as after the module's own
        ``load_state_dict``."""
        for bucket in self.layout.buckets:
            if self.has_separate_master(bucket):
                with self.chunks[bucket.index].changing():
                    self.masters[bucket.index].copy_(self.own_slice(bucket))

    def parameters_from_masters(self, communicator: Communicator) -> None:
        """Overwrite the model's values with the masters, gathered from all shards."""
        self.settle()
        for bucket in self.layout.buckets:
            if self.has_separate_master(bucket):
                with self.chunks[bucket.index].changing():
                    self.own_slice(bucket).copy_(self.masters[bucket.index])
            self.gather(bucket, communicator).wait()

    def gather(self, bucket: Bucket, communicator: Communicator) -> Pending:
        """Bring a bucket that is whole on every rank up to date with the slices; one of a unit is when it is fetched."""
        if bucket.shards == 1 or bucket.unit is not None:
            return DONE
        return communicator.all_gather(self.buffers[bucket.index], purpose=f"gather of {bucket.label}")

    def _take_back(self, bucket: Bucket) -> None:
        if bucket.unit is None:
            self._make_views(bucket)
            return
        for placement in bucket.placements:
            released.release(self.parameters[placement.spec.name])

    def _make_views(self, bucket: Bucket) -> None:
        for placement in bucket.placements:
            view = self.view(bucket, placement).view(placement.spec.shape)
            self.parameters[placement.spec.name].data = view
