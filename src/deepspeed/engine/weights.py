"""The model's weights alone, whole and in the model's dtype, for inference and for other libraries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoint.directory import on_all_ranks
from ..checkpoint.utils import clone_tensors_for_torch_save
from ..comm.communicator import Communicator
from ..zero.presence import OffloadStateTypeEnum
from ..zero.sharding import ShardedModel


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


def save_weights(path: Path, state: Mapping[str, Tensor] | None, communicator: Communicator) -> None:
    """Write rank 0's ``state`` to ``path``, whole or not at all: as safetensors where the name ends so, else as
    ``torch.save`` does. Safetensors holds a tied weight once for each of its names. Called on all ranks.

    Raises CheckpointError on every rank where writing fails.
    """
    temporary = path.with_name(f".{path.name}.saving")

    def write() -> None:
        if state is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.suffix == ".safetensors":
                tensors = {name: value.clone().contiguous() for name, value in state.items()}
                save_file(tensors, temporary, metadata={"format": "pt"})
            else:
                torch.save(state, temporary)
            temporary.replace(path)
        except RuntimeError as error:
            # torch.save's word for a write that failed.
            raise OSError(str(error)) from error
        finally:
            temporary.unlink(missing_ok=True)

    on_all_ranks(write, f"saving {path}", communicator)
