"""Construct a model in shards: a module's parameters are sharded as soon as the module is complete.

Nothing of torch is replaced. torch calls hooks when a module registers a parameter, and when it registers a submodule:
then the submodule is complete, its initialization included. So is one that others have followed, which a list of modules
is waiting to register. What is in no module (the outermost one's own parameters) is sharded at the end of the context.

Code that initializes weights afterwards works: a parameter that is touched is gathered, in the dtype that it was
constructed in, and what was written on rank 0 is everyone's when others are touched, or at the end. Until then a copy of
a released parameter is a released one too. Asked for its shape, a parameter answers as if it were whole until an engine
takes it over: small ones are whole, and code compares the shape of one with that of another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from ..comm.communicator import Communicator
from ..comm.operations import Pending
from ..comm.sharding import ShardGroups
from ..memory.heap import FreedMemory
from ..memory.layout import FlatLayout, ParameterSpec
from ..memory.pages import prefer_huge_pages
from ..memory.pool import BufferPool
from ..memory.tiers import Chunk
from ..native.hashing import hash_of
from .parameters import FlatParameters, unchanged
from .released import home_of
from .tiers import IN_MEMORY, Tiers
from .units import ParameterUnit, Replica, UnitPart

HELD_WHILE_TOUCHED = 4
"""Units that stay gathered while code initializes parameters: an operation may read one and write another."""

INCOMPLETE = 3
"""Modules whose parameters stay whole as long as nothing registers these modules."""

FREED_NBYTES = 64 << 20
"""Bytes of whole parameters that are freed before the system gets back the holes that they leave."""

COMPARED_NBYTES = 1 << 20
"""Bytes of values from which ranks compare what they have before one of them sends: smaller ones are sent as soon."""

UNDER_WAY = 2
"""Slices that are on their way to the other ranks while the next parameters are constructed."""


@dataclass(frozen=True)
class _UnderWay:
    """Slices on their way: rank 0 has the ``whole`` that they are of; the own one is ``chunk``'s where it lies on a tier."""

    pending: Pending
    whole: Tensor | None
    chunk: Chunk | None


class ModuleSharder:
    """Shards parameters over the ranks of ``communicator``, a unit each, in ``dtype`` (their own where None), with rank
    0's values. What lies on ``tiers`` goes there as soon as it is complete. Parameters of up to ``resident_numel`` elements
    stay whole on every rank, until they are ``resident_total`` in all."""

    def __init__(
        self,
        communicator: Communicator,
        *,
        dtype: torch.dtype | None,
        resident_numel: int,
        resident_total: int,
        tiers: Tiers = IN_MEMORY,
    ):
        self._communicator = communicator
        self._dtype = dtype
        self._tiers = tiers
        self._resident_numel = resident_numel
        self._resident_left = resident_total
        self._incomplete: dict[int, nn.Module] = {}
        self._residents: list[nn.Parameter] = []
        self._touched: deque[ParameterUnit] = deque()
        self._under_way: deque[_UnderWay] = deque()
        self._wholes = BufferPool()
        self._freed = FreedMemory(FREED_NBYTES)
        self._constructed_in: WeakKeyDictionary[ParameterUnit, torch.dtype] = WeakKeyDictionary()

    def parameter_registered(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Remember that ``module`` has parameters of its own."""
        if parameter is not None and home_of(parameter) is None and id(module) not in self._incomplete:
            self._incomplete[id(module)] = module
            while len(self._incomplete) > INCOMPLETE:
                self._shard_own(self._incomplete.pop(next(iter(self._incomplete))))

    def module_registered(self, parent: nn.Module, name: str, module: nn.Module | None) -> None:
        """Shard ``module``, which is complete, and what is inside it."""
        if module is not None:
            self.shard(module)

    def shard(self, module: nn.Module) -> None:
        """Shard ``module`` and what is inside it, where that has not happened."""
        for inner in module.modules():
            self._incomplete.pop(id(inner), None)
            self._shard_own(inner)

    def finish(self) -> None:
        """Shard what is left, and take over what was written into sharded parameters."""
        for module in list(self._incomplete.values()):
            self._shard_own(module)
        self._keep_touched(0)
        self.settle()
        self._wholes.release()
        self._freed.give_back()
        self._replicate()
        self._refuse_touches()

    def abandon(self) -> None:
        """An exception ended the construction: keep nothing."""
        for unit in self._touched:
            unit.let_go()
        self._touched.clear()
        self._refuse_touches()

    # -- what units ask of their constructor -----------------------------------------------------------------------------

    def copied(self, unit: ParameterUnit, parameter: nn.Parameter) -> nn.Parameter:
        """A copy of a released ``parameter``, with slices of its own."""
        (part,) = unit.parts
        self.settle()
        values = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        copy = nn.Parameter(values, requires_grad=parameter.requires_grad)
        (name,) = part.flat.parameters
        with part.chunk.reading():
            own = part.flat.own_slice(part.bucket).clone()
        self._adopt(copy, name, part.flat.layout, own, constructed_in=self._constructed_in[unit]).chunk.evict()
        return copy

    def settle(self, under_way: int = 0) -> None:
        """Wait until at most so many slices are under way to the other ranks."""
        while len(self._under_way) > under_way:
            slices = self._under_way.popleft()
            slices.pending.wait()
            if slices.whole is not None:
                self._wholes.give_back(slices.whole)
            if slices.chunk is not None:
                slices.chunk.evict()

    # -- sharding --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _shard_own(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if home_of(parameter) is None and not is_lazy(parameter) and not parameter.is_meta:
                if self._stays_whole(parameter):
                    Replica(parameter, self._communicator)
                    self._residents.append(parameter)
                else:
                    self._shard(parameter, f"{type(module).__name__}.{name}")

    def _stays_whole(self, parameter: nn.Parameter) -> bool:
        numel = parameter.numel()
        stays = numel == 0 or (numel <= self._resident_numel and numel <= self._resident_left)
        self._resident_left -= numel if stays else 0
        return stays

    def _shard(self, parameter: nn.Parameter, name: str) -> None:
        dtype = self._dtype_of(parameter)
        spec = ParameterSpec(name, tuple(parameter.shape), str(dtype).removeprefix("torch."), unit=0)
        layout = FlatLayout.build([spec], shards=self._communicator.size, bucket_numel=0)
        own = parameter.new_empty(layout.slice_numel, dtype=dtype)
        prefer_huge_pages(own)
        values = parameter.detach()
        part = self._adopt(parameter, name, layout, own, constructed_in=parameter.dtype)
        self._keep(values, part, name=f"'{name}'")
        self._freed.add(values.nbytes)

    def _keep(self, values: Tensor, part: UnitPart, *, name: str) -> None:
        """Give each rank its slice of rank 0's ``values``, of a parameter alone in its unit."""
        self.settle(UNDER_WAY - 1)
        part.chunk.claim()
        if self._are_everyones(values, name):
            self._cut(values, part)
        else:
            self._scatter(values, part, name)

    def _are_everyones(self, values: Tensor, name: str) -> bool:
        """Whether all ranks have the same ``values``, as they do that drew them alike: then none has to send them."""
        if self._communicator.size == 1:
            return True
        if values.nbytes < COMPARED_NBYTES or values.device.type != "cpu":
            return False
        hashes = torch.empty(self._communicator.size, dtype=torch.int64)
        hashes[self._communicator.rank] = int(hash_of(values.contiguous()), 16) - (1 << 63)  # as a signed number
        self._communicator.all_gather(hashes, purpose=f"comparison of {name}").wait()
        return bool((hashes == hashes[0]).all())

    def _cut(self, values: Tensor, part: UnitPart) -> None:
        own, flat = part.flat.own_slice(part.bucket), values.reshape(-1)
        end = 0
        for fragment in part.bucket.fragments(self._communicator.rank):
            start = fragment.parameter_start
            own[fragment.slice_range].copy_(flat[start : start + fragment.numel])
            end = fragment.slice_range.stop
        own[end:].zero_()
        part.chunk.evict()

    def _scatter(self, values: Tensor, part: UnitPart, name: str) -> None:
        own, whole = part.flat.own_slice(part.bucket), None
        if self._communicator.rank == 0:
            (placement,) = part.bucket.placements
            whole = self._wholes.take(part.bucket.numel, dtype=own.dtype, device=own.device)
            whole[placement.start : placement.stop].view(placement.spec.shape).copy_(values)
            for gap in part.bucket.gaps:
                whole[gap].zero_()
        pending = self._communicator.scatter(whole, own, purpose=f"scatter of {name}")
        self._under_way.append(_UnderWay(pending, whole, part.chunk if part.chunk.evictables() else None))

    def _on_memory(self, unit: ParameterUnit, change: int) -> None:
        if change < 0:
            self._freed.add(-change * max(part.whole.element_size() for part in unit.parts))

    def _adopt(
        self, parameter: nn.Parameter, name: str, layout: FlatLayout, own: Tensor, *, constructed_in: torch.dtype
    ) -> UnitPart:
        """Release ``parameter`` into a unit with this rank's slice ``own``, in memory."""
        (bucket,) = layout.buckets
        shard = self._communicator.rank
        flat = FlatParameters(layout, {name: parameter}, shard=shard, master_dtype=unchanged, tiers=self._tiers)
        flat.put_in(bucket, own)
        part = UnitPart(flat, bucket)
        part.release()
        unit = ParameterUnit(0, name, [part], ShardGroups.whole(self._communicator))
        unit.on_touch = self._on_touch
        unit.constructor = self
        unit.on_memory = self._on_memory
        unit.shows_sizes = True
        self._constructed_in[unit] = constructed_in
        return part

    def _on_touch(self, unit: ParameterUnit, parameter: nn.Parameter, operation: str) -> None:
        self._keep_touched(HELD_WHILE_TOUCHED - 1)
        unit.hold()
        self._touched.append(unit)
        parameter.data = parameter.data.to(self._constructed_in[unit])

    @torch.no_grad()
    def _keep_touched(self, remaining: int) -> None:
        while len(self._touched) > remaining:
            unit = self._touched.popleft()
            (part,) = unit.parts
            for parameter in unit.parameters():
                self._keep(parameter.detach(), part, name=unit.describe(parameter))
            unit.let_go()

    @torch.no_grad()
    def _replicate(self) -> None:
        """Give all ranks rank 0's values of what stays whole, a broadcast per dtype."""
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in self._residents:
            parameter.data = parameter.data.to(self._dtype_of(parameter))
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for parameters in by_dtype.values():
            values = torch.cat([p.detach().reshape(-1) for p in parameters])
            self._communicator.broadcast(values, purpose="broadcast of what stays whole").wait()
            for parameter, value in zip(parameters, values.split([p.numel() for p in parameters]), strict=True):
                parameter.copy_(value.view_as(parameter))
        self._residents.clear()

    def _refuse_touches(self) -> None:
        self._incomplete.clear()
        for unit in list(self._constructed_in):
            unit.retire()

    def _dtype_of(self, parameter: nn.Parameter) -> torch.dtype:
        return self._dtype if self._dtype is not None and parameter.is_floating_point() else parameter.dtype


class SharderContext:
    """While it is entered, ``sharder`` hears of every module and parameter that is registered in this process, and tensors
    are made within ``places``. Inside another one it does nothing: a model has one sharder."""

    def __init__(self, sharder: ModuleSharder, places: Iterable[AbstractContextManager[object]] = ()):
        self._sharder = sharder
        self._places = tuple(places)
        self._entered = ExitStack()

    def __enter__(self) -> None:
        if _is_entered():
            return
        sharder = self._sharder
        for hook in (
            torch_module.register_module_parameter_registration_hook(sharder.parameter_registered),
            torch_module.register_module_module_registration_hook(sharder.module_registered),
        ):
            self._entered.callback(hook.remove)
        for place in self._places:
            self._entered.enter_context(place)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered.close()
        if error is None:
            self._sharder.finish()
        else:
            self._sharder.abandon()


def _is_entered() -> bool:
    hooks = torch_module._global_module_registration_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), ModuleSharder) for hook in hooks)
