"""Whether all ranks build the same engine: what differs would otherwise hang or train to other numbers in silence."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from ..comm.communicator import Communicator
from ..config import DeepSpeedConfig
from ..zero.released import shape_of

COMPARED = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "fp16",
    "bf16",
    "torch_autocast",
    "data_types",
    "communication_data_type",
    "gradient_allreduce_op",
    "prescale_gradients",
    "gradient_predivide_factor",
    "zero_optimization",
)
"""The keys of the configuration that must be equal on all ranks."""


def describe(module: nn.Module, optimizer: torch.optim.Optimizer | None, config: DeepSpeedConfig) -> list[str]:
    """What ranks must have in common, a line for each parameter, buffer, parameter group and section."""
    group_of = {}
    lines = []
    for index, group in enumerate(optimizer.param_groups if optimizer is not None else []):
        group_of.update({id(p): index for p in group["params"]})
        options = {key: value for key, value in group.items() if isinstance(value, (bool, int, float, str, tuple))}
        lines.append(f"parameter group {index} of {type(optimizer).__name__}: {options}")
    for name, p in module.named_parameters():
        role = f"group {group_of[id(p)]}" if id(p) in group_of else "not optimized"
        lines.append(f"{name}: {tuple(shape_of(p))} {p.dtype}, {role}{'' if p.requires_grad else ', frozen'}")
    lines += [f"buffer {name}: {tuple(buffer.shape)} {buffer.dtype}" for name, buffer in module.named_buffers()]
    settings = config.model_dump(include=set(COMPARED))
    lines += [f"{key}: {settings[key]}" for key in COMPARED]
    return lines


def check_ranks_agree(mine: Sequence[str], communicator: Communicator) -> None:
    """Raise ValueError on every rank where the ranks' descriptions differ, naming the first difference."""
    digest = hashlib.sha256("\n".join(mine).encode()).hexdigest()
    if len(set(communicator.gather_objects(digest, purpose="comparison of model and configuration"))) == 1:
        return
    everyone = communicator.gather_objects(list(mine), purpose="search for a difference in model or configuration")
    for rank, theirs in enumerate(everyone):
        for index in range(max(len(theirs), len(everyone[0]))):
            first, other = (lines[index] if index < len(lines) else "nothing" for lines in (everyone[0], theirs))
            if first != other:
                raise ValueError(
                    f"ranks disagree on the model or configuration: rank 0 has '{first}' where rank {rank} has "
                    f"'{other}'. Build the same model from the same configuration on every rank."
                )
