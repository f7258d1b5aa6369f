"""Parameters that were frozen when the optimizer was sharded, and are unfrozen later.

A frozen parameter has no place in the layout: no master, no gradient buffer, no optimizer state. Where autograd gives it a
gradient nevertheless (``requires_grad_(True)`` between two steps) that waits in its ``grad`` for the step, as in plain
PyTorch. There all ranks learn of it in the agreement that precedes the step, lay it out in buckets behind the others, and
reduce its gradient with the late ones; from then on it is a parameter as any other. One that stage 3 has sharded moves
within its unit, from the slice of what is only sharded to one with a master.

Below stage 3 it may be unfrozen on some ranks alone: on the others its gradient is zero. At stage 3 ranks fetch together in
backward, and must come by the same modules: they compare what is frozen before each backward.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..comm.communicator import Communicator
from ..memory.layout import ParameterSpec
from ..optim.segments import FlatShard
from .released import home_of, shape_of
from .streaming import move_with_masters
from .units import ParameterUnit, Resident, UnitPart

if TYPE_CHECKING:
    from .optimizer import ShardedOptimizer

logger = logging.getLogger("DeepSpeed")


class FrozenParameters:
    """The frozen ones of ``parameters``, a model's by name. ``waiting`` are those in one of the optimizer's ``groups``;
    ``bucket_numel`` is the size of the buckets in which they will be laid out."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], groups: Sequence[Mapping[str, Any]], *, bucket_numel: int):
        frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        self._group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        self.bucket_numel = bucket_numel
        self.waiting = {name: p for name, p in frozen.items() if id(p) in self._group_of}
        self._in_no_group = {name: p for name, p in frozen.items() if id(p) not in self._group_of}

    def unfrozen(self) -> list[str]:
        """Those in ``waiting`` that have a gradient on this rank."""
        return [name for name, p in self.waiting.items() if p.requires_grad and p.grad is not None]

    def take(self, names: Collection[str]) -> list[tuple[ParameterSpec, nn.Parameter]]:
        """The parameters ``names``, in the model's order, with their specifications; they wait no longer."""
        taken = [(name, self.waiting.pop(name)) for name in list(self.waiting) if name in names]
        return [
            (
                ParameterSpec(
                    name,
                    tuple(shape_of(p)),
                    str(p.dtype).removeprefix("torch."),
                    group=self._group_of[id(p)],
                    unit=home.index if isinstance(home := home_of(p), ParameterUnit) else None,
                ),
                p,
            )
            for name, p in taken
        ]

    def forget_gradients(self) -> None:
        """Set ``grad`` to None."""
        for parameter in self.waiting.values():
            parameter.grad = None

    def warn_of_unoptimized(self) -> None:
        """Name, once, the unfrozen parameters that are in no group: nobody trains them."""
        found = [name for name, p in self._in_no_group.items() if p.requires_grad]
        for name in found:
            del self._in_no_group[name]
        if found:
            logger.warning(
                "unfrozen, but in none of the optimizer's parameter groups and so not trained: %s%s. Give them to "
                "deepspeed.initialize in model_parameters or in the optimizer, frozen or not.",
                ", ".join(found[:5]),
                " and others" if len(found) > 5 else "",
            )


def check_frozen_alike(parameters: Mapping[str, nn.Parameter], communicator: Communicator) -> None:
    """Raise RuntimeError, on every rank, where one of ``parameters`` is frozen on some of the ranks alone. Called on all
    ranks, with the same parameters."""
    if communicator.size == 1 or not parameters:
        return
    mine = bytes(p.requires_grad for p in parameters.values())
    device = next(iter(parameters.values())).device
    digests = torch.empty(communicator.size, dtype=torch.int64, device=device)
    digests[communicator.rank] = int.from_bytes(hashlib.blake2b(mine, digest_size=8).digest(), "little", signed=True)
    communicator.all_gather(digests, purpose="comparison of what is frozen").wait()
    if bool((digests == digests[0]).all()):
        return
    everyone = communicator.gather_objects(mine, purpose="search for what is frozen on some ranks")
    flags = dict(zip(parameters, zip(*everyone, strict=True), strict=True))
    differing = [name for name, of_ranks in flags.items() if len(set(of_ranks)) > 1]
    trained = [rank for rank, flag in enumerate(flags[differing[0]]) if flag]
    frozen = [rank for rank, flag in enumerate(flags[differing[0]]) if not flag]
    others = f" and {len(differing) - 1} more are" if len(differing) > 1 else " is"
    raise RuntimeError(
        f"'{differing[0]}'{others} trained on some ranks and frozen on others: it has requires_grad on {_ranks(trained)}, and "
        f"not on {_ranks(frozen)}. At ZeRO stage 3 all ranks run the same backward: call requires_grad_ alike on every rank, "
        "before the forward"
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def unfreeze(optimizer: ShardedOptimizer, names: Collection[str]) -> None:
    """Lay out the waiting parameters ``names`` behind the others, with masters and, at their first step, optimizer states
    of their own. The gradients that they have count in the next reduction. Called on all ranks with the same names."""
    taken = optimizer.frozen.take(names)
    parameters = {spec.name: parameter for spec, parameter in taken}
    homes = {name: home for name, p in parameters.items() if (home := home_of(p)) is not None}
    units = {home.index: home for home in homes.values() if isinstance(home, ParameterUnit)}
    left = {id(part.flat): part.flat for unit in units.values() for part in unit.parts if part.flat is not optimizer.flat}
    flat, known = optimizer.flat, len(optimizer.shards)
    layout = flat.layout.extended([spec for spec, _ in taken], bucket_numel=optimizer.frozen.bucket_numel)
    flat.extend(layout, parameters, optimizer.communicator)
    buckets = layout.buckets[known:]
    for other in left.values():
        other.lose(parameters.keys())
    for bucket in buckets:
        if bucket.unit is not None:
            units[bucket.unit].add(UnitPart(flat, bucket))
        elif homes:
            for placement in bucket.placements:
                Resident(flat.parameters[placement.spec.name], flat, bucket, optimizer.communicator)
    optimizer.reducer.extend(buckets, parameters)
    optimizer.segments.extend([FlatShard(flat.masters[bucket.index], bucket, flat.shard) for bucket in buckets])
    optimizer.shards = optimizer.segments.shards
    move_with_masters(optimizer, optimizer.shards[known:])
