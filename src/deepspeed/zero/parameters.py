"""The model's trainable parameters, moved into one flat buffer per bucket.

Each parameter becomes a view of its bucket's buffer, so that a bucket is communicated, stepped and gathered without
copies. Where the optimizer works on another dtype than the model, a *master* copy of the own slice is kept in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..comm.communicator import Communicator
from ..memory.layout import Bucket, FlatLayout, Placement


class FlatParameters:
    """Buffers and own slices of the trainable parameters.

    ``buffers[i]`` is bucket i's whole buffer in the model's dtype; ``masters[i]`` is this shard's slice in fp32: the
    buffer's own memory where the model itself is fp32, a separate tensor elsewhere.
    """

    def __init__(self, layout: FlatLayout, parameters: Mapping[str, nn.Parameter], *, shard: int):
        self.layout = layout
        self.parameters = parameters
        self.shard = shard
        self.buffers: list[Tensor] = []
        self.masters: list[Tensor] = []

    def move_in(self, communicator: Communicator) -> None:
        """Copy the parameters into their buckets' buffers, with rank 0's values on every rank, and make them views.

        Masters keep the precision that the parameters came with, also where the model's dtype is narrower. One bucket
        in fp32 is the extra memory. Buckets that are there already stay as they are.
        """
        for bucket in self.layout.buckets[len(self.buffers) :]:
            device = self.parameters[bucket.placements[0].spec.name].device
            dtype: torch.dtype = getattr(torch, bucket.dtype)
            whole = torch.zeros(bucket.numel, dtype=_master_dtype(dtype), device=device)
            for placement in bucket.placements:
                parameter = self.parameters[placement.spec.name]
                whole[placement.start : placement.stop].view(placement.spec.shape).copy_(parameter.detach())
            communicator.broadcast(whole).wait()
            own = whole[bucket.slice_range(self.shard)]
            self.masters.append(own.clone() if dtype != whole.dtype else own)
            self.buffers.append(whole.to(dtype))
        self._make_views()

    def extend(self, layout: FlatLayout, parameters: Mapping[str, nn.Parameter], communicator: Communicator) -> None:
        """Follow ``layout``, which has ``parameters`` in further buckets, and move these in."""
        self.layout = layout
        self.parameters = {**self.parameters, **parameters}
        self.move_in(communicator)

    def own_slice(self, bucket: Bucket) -> Tensor:
        """This shard's slice of the bucket's buffer, in the model's dtype."""
        return self.buffers[bucket.index][bucket.slice_range(self.shard)]

    def has_separate_master(self, bucket: Bucket) -> bool:
        """Whether the bucket's master is a tensor of its own."""
        return self.buffers[bucket.index].dtype != self.masters[bucket.index].dtype

    def view(self, bucket: Bucket, placement: Placement) -> Tensor:
        """The 1-D part of the bucket's buffer that holds a parameter."""
        return self.buffers[bucket.index][placement.start : placement.stop]

    @contextmanager
    def detached(self, communicator: Communicator, *, sharded: bool) -> Iterator[None]:
        """Within, each parameter is a tensor of its own with its fp32 value, to be written or replaced (``.data``) at will.
        Afterwards it is a view of its bucket again and the masters have what was written; where the body raises, they stay
        as they were. ``parameters_from_masters`` then gives the values to the model. Costs the whole model in fp32.
        """
        wholes = []
        for bucket, master in zip(self.layout.buckets, self.masters, strict=True):
            whole = master.new_zeros(bucket.numel)
            whole[bucket.slice_range(self.shard)] = master
            if sharded:
                communicator.all_gather(whole).wait()
            wholes.append(whole)
            for placement in bucket.placements:
                value = whole[placement.start : placement.stop].view(placement.spec.shape)
                self.parameters[placement.spec.name].data = value
        try:
            yield
            for bucket, whole in zip(self.layout.buckets, wholes, strict=True):
                for placement in bucket.placements:
                    value = self.parameters[placement.spec.name].detach()
                    whole[placement.start : placement.stop].view(placement.spec.shape).copy_(value)
                self.masters[bucket.index].copy_(whole[bucket.slice_range(self.shard)])
        finally:
            self._make_views()

    def masters_from_parameters(self) -> None:
        """Overwrite the separate masters with the model's present values, as after the module's own
        ``load_state_dict``."""
        for bucket in self.layout.buckets:
            if self.has_separate_master(bucket):
                self.masters[bucket.index].copy_(self.own_slice(bucket))

    def parameters_from_masters(self, communicator: Communicator, *, sharded: bool) -> None:
        """Overwrite the model's values with the masters, gathered from all shards."""
        for bucket in self.layout.buckets:
            if self.has_separate_master(bucket):
                self.own_slice(bucket).copy_(self.masters[bucket.index])
            if sharded:
                communicator.all_gather(self.buffers[bucket.index]).wait()

    def _make_views(self) -> None:
        for bucket in self.layout.buckets:
            for placement in bucket.placements:
                view = self.view(bucket, placement).view(placement.spec.shape)
                self.parameters[placement.spec.name].data = view


def _master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the optimizer works on parameters of ``dtype``: at least fp32."""
    return torch.promote_types(dtype, torch.float32)
