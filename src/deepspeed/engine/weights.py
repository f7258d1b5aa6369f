"""The model's weights alone, whole and in the model's dtype, for inference and for other libraries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.directory import on_all_ranks
from ..checkpoint.utils import clone_tensors_for_torch_save
from ..checkpoint.weight_files import Weight, write_weights
from ..comm.communicator import Communicator
from ..zero.presence import OffloadStateTypeEnum
from ..zero.released import shape_of
from ..zero.sharding import ShardedModel
from ..zero.units import ParameterUnit


def consolidated_state_dict(
    module: nn.Module, model: ShardedModel, communicator: Communicator, *, exclude_frozen_parameters: bool = False
) -> OrderedDict[str, Tensor] | None:
    """On rank 0 the module's state dict on CPU, tied tensors shared; None on the others. Called on all ranks. Sharded
    parameters are gathered unit by unit."""
    model.trained.presence.require("a state dict of the model", OffloadStateTypeEnum.lp_params)
    gathered = _gathered_on_first_rank(model, communicator)
    if communicator.rank != 0:
        return None
    left_out = frozen_parameters(module) if exclude_frozen_parameters else set()
    state = OrderedDict((name, value) for name, value in module.state_dict(keep_vars=True).items() if name not in left_out)
    whole = {name: value for name, value in state.items() if id(value) not in gathered}
    copies = clone_tensors_for_torch_save(whole)
    return OrderedDict((name, gathered[id(value)] if id(value) in gathered else copies[name]) for name, value in state.items())


def _gathered_on_first_rank(model: ShardedModel, communicator: Communicator) -> dict[int, Tensor]:
    """Copies on CPU of the sharded parameters, by identity; none on the other ranks."""
    copies = {}
    for unit in model.scopes.fetcher.units:
        unit.hold()
        if communicator.rank == 0:
            copies.update({id(p): p.detach().to("cpu", copy=True) for p in unit.parameters()})
        unit.let_go()
    return copies


def frozen_parameters(module: nn.Module) -> set[str]:
    """The names of the parameters that are not trained."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


def save_weights(
    path: Path,
    module: nn.Module,
    model: ShardedModel,
    communicator: Communicator,
    *,
    exclude_frozen_parameters: bool = False,
    max_shard_size: int | str | None = None,
) -> None:
    """Write the module's tensors, in their dtypes, to ``path`` as ``write_weights`` does. Called on all ranks: rank 0 writes,
    and of the sharded parameters has one unit at a time.

    Raises CheckpointError on every rank where writing fails.
    """
    model.trained.presence.require("a file of the model's weights", OffloadStateTypeEnum.lp_params)
    walk = _UnitWalk(model.scopes.fetcher.units)
    left_out = frozen_parameters(module) if exclude_frozen_parameters else set()

    def write() -> None:
        try:
            if communicator.rank == 0:
                write_weights(path, _weights(module, walk, left_out), max_shard_size)
        finally:
            # Whatever happened here: the other ranks gather all units.
            walk.go_on_to(len(walk.units))

    on_all_ranks(write, f"saving {path}", communicator)


class _UnitWalk:
    """Goes through ``units`` once, all ranks in the same order; one is whole at a time."""

    def __init__(self, units: Sequence[ParameterUnit]):
        self.units = units
        self._passed = -1

    def go_on_to(self, position: int) -> None:
        """Make the unit at ``position`` whole, or none where it is past the last."""
        while self._passed < position:
            if 0 <= self._passed < len(self.units):
                self.units[self._passed].let_go()
            self._passed += 1
            if self._passed < len(self.units):
                self.units[self._passed].hold()


def _weights(module: nn.Module, walk: _UnitWalk, left_out: set[str]) -> list[Weight]:
    """The module's tensors in the order of the walk, behind those that are whole on every rank."""
    position = {id(p): index for index, unit in enumerate(walk.units) for p in unit.parameters()}
    names: dict[int, list[str]] = {}
    tensors: dict[int, Any] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and name not in left_out:
            names.setdefault(id(value), []).append(name)
            tensors[id(value)] = value

    def load(key: int, target: Tensor) -> None:
        walk.go_on_to(position.get(key, -1))
        with torch.no_grad():
            target.copy_(tensors[key])

    return [
        Weight(tuple(names[key]), tuple(shape_of(tensors[key])), tensors[key].dtype, partial(load, key))
        for key in sorted(tensors, key=lambda key: position.get(key, -1))
    ]
