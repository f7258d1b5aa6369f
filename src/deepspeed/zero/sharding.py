"""From a model to its parameters in flat buffers, and under stage 3 in units that its modules fetch and release."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from ..comm.communicator import Communicator
from ..comm.sharding import ShardGroups
from ..memory.heap import FreedMemory
from ..memory.layout import FlatLayout, ParameterSpec
from ..optim.segments import FlatShard
from . import released
from .arriving import Hops
from .fetching import FetchLimits, UnitFetcher
from .parameters import FlatParameters, unchanged
from .plan import UnitPlan
from .released import home_of, shape_of
from .scopes import ModuleScopes
from .tiers import IN_MEMORY, Tiers
from .unfreezing import check_frozen_alike
from .units import ParameterUnit, Replica, Resident, UnitPart

FREED_NBYTES = 256 << 20
"""Bytes of parameters that move, after which the system gets back the holes that they leave."""


@dataclass(frozen=True)
class ModelLayout:
    """How a model's parameters are laid out: the trained ones in ``trained``, and of the others those that are sharded, in
    ``frozen``. ``plan`` has no units below stage 3."""

    plan: UnitPlan
    trained: FlatLayout
    frozen: FlatLayout

    @staticmethod
    def build(
        module: nn.Module,
        group_of: Mapping[str, int],
        plan: UnitPlan,
        *,
        dtype_of: Callable[[torch.Tensor], torch.dtype],
        lay_out: Callable[[Iterable[ParameterSpec]], FlatLayout],
    ) -> ModelLayout:
        """Lay out ``module``, its trained parameters and its others each by ``lay_out``. ``group_of`` is the optimizer group
        of each trained parameter, by its first name; ``dtype_of`` says which dtype a parameter is to have."""
        specs = [
            ParameterSpec(
                name,
                tuple(shape_of(p)),
                str(dtype_of(p)).removeprefix("torch."),
                group=group_of.get(name, 0),
                unit=plan.unit_of.get(name),
            )
            for name, p in module.named_parameters()
        ]
        trained = [spec for spec in specs if spec.name in group_of]
        frozen = [spec for spec in specs if spec.name not in group_of and spec.unit is not None]
        return ModelLayout(plan, lay_out(trained), lay_out(frozen))


@dataclass(frozen=True)
class ShardedModel:
    """A model whose parameters have moved: ``trained`` is what an optimizer steps, ``frozen`` what is only sharded."""

    module: nn.Module
    trained: FlatParameters
    frozen: FlatParameters
    scopes: ModuleScopes
    groups: ShardGroups
    fetching: ShardGroups

    @property
    def frozen_shards(self) -> tuple[FlatShard, ...]:
        """This rank's slices of what is sharded and not trained."""
        flat = self.frozen
        return tuple(FlatShard(flat.own_slice(bucket), bucket, flat.shard) for bucket in flat.layout.buckets)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """A backward runs inside, the same on all ranks where they fetch together. Raises RuntimeError where ranks have frozen
        other parameters than others, and what :meth:`ModuleScopes.backward` raises."""
        with self.scopes.backward():
            if self.scopes.fetcher.units:
                check_frozen_alike(self._parameters, self.groups.everyone)
            yield

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def close(self) -> None:
        """Take the hooks off the modules and free the masters. What units sharded stays so, as ``zero.Init`` leaves it;
        the other parameters stay whole. Called on all ranks."""
        self.scopes.settle()
        self.scopes.close()
        groups = self.groups.unchecked()
        for unit in self.scopes.fetcher.units:
            unit.retire(groups)
        for flat in (self.trained, self.frozen):
            flat.drop_masters()
        for parameter in self.module.parameters():
            home = home_of(parameter)
            if isinstance(home, Resident):
                home.give_up(parameter)
                Replica(parameter, groups.everyone)
        if self.fetching is not self.groups:
            self.fetching.close()


def move_in(
    module: nn.Module,
    layout: ModelLayout,
    groups: ShardGroups,
    fetching: ShardGroups,
    limits: FetchLimits,
    tiers: Tiers = IN_MEMORY,
) -> ShardedModel:
    """Move the parameters of ``module`` into the buffers of ``layout``, with rank 0's values. Units are released as soon
    as they are complete.

    ``fetching`` are the groups of units: the shards in one of their own, since the order of fetches and reductions relative
    to each other may differ between ranks. What lies on ``tiers`` goes there as soon as it is complete.
    """
    communicator = groups.everyone
    named = dict(module.named_parameters())
    for name, parameter in named.items():
        if name not in layout.trained.homes and name not in layout.frozen.homes:
            _make_whole(parameter)
    parts: dict[int, list[UnitPart]] = {index: [] for index in range(len(layout.plan.names))}
    shard = groups.shards.rank if layout.trained.shards > 1 else 0
    trained = FlatParameters(layout.trained, _of(layout.trained, named), shard=shard, tiers=tiers)
    frozen = FlatParameters(layout.frozen, _of(layout.frozen, named), shard=shard, master_dtype=unchanged, tiers=tiers)
    freed = FreedMemory(FREED_NBYTES)
    for flat in (trained, frozen):
        for bucket in flat.move_in(communicator):
            freed.add(2 * flat.buffers[bucket.index].nbytes)
            if bucket.unit is not None:
                part = UnitPart(flat, bucket)
                part.release()
                parts[bucket.unit].append(part)
            elif layout.plan.gives_homes:
                for placement in bucket.placements:
                    Resident(flat.parameters[placement.spec.name], flat, bucket, communicator)
    freed.give_back()
    if layout.plan.gives_homes:
        _replicate([p for p in named.values() if home_of(p) is None], communicator)
    hops = Hops()
    units = [ParameterUnit(index, name, parts[index], fetching, hops) for index, name in enumerate(layout.plan.names)]
    modules = dict(module.named_modules())
    needs = {modules[name]: [units[index] for index in indices] for name, indices in layout.plan.needs.items()}
    scopes = ModuleScopes(UnitFetcher(units, limits, hops), needs)
    trained.settle = scopes.settle
    frozen.presence = trained.presence
    return ShardedModel(module, trained, frozen, scopes, groups, fetching)


def _make_whole(parameter: nn.Parameter) -> None:
    """Take ``parameter`` from its home, where it has one."""
    home = home_of(parameter)
    if home is not None:
        home.hold()
        values = parameter.detach().clone()
        home.give_up(parameter)
        home.let_go()
        released.expose(parameter, values)


def _replicate(parameters: Iterable[nn.Parameter], communicator: Communicator) -> None:
    for parameter in parameters:
        Replica(parameter, communicator)


def _of(layout: FlatLayout, named: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters of ``layout``, in the order of ``named``."""
    return {name: parameter for name, parameter in named.items() if name in layout.homes}
