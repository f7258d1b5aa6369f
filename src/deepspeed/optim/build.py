"""The optimizer that the configuration names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from .adam import Adam


def build_optimizer(
    kind: str, params: Mapping[str, Any], parameter_groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """An optimizer of type ``kind`` (Adam, AdamW, SGD, Adagrad, in any case) over ``parameter_groups``.

    Raises ValueError for an unknown type, or a parameter that it does not have.
    """
    arguments = dict(params)
    name = kind.lower()
    if name in ("adam", "adamw"):
        if arguments.pop("torch_adam", False):
            decoupled = arguments.pop("adam_w_mode", True) or name == "adamw"
            return _make(torch.optim.AdamW if decoupled else torch.optim.Adam, kind, arguments, parameter_groups)
        if name == "adamw":
            arguments.setdefault("weight_decay", 0.01)
            arguments["adam_w_mode"] = True
        return _make(Adam, kind, arguments, parameter_groups)
    plain: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
    if name not in plain:
        raise ValueError(f"optimizer.type: found '{kind}'; the optimizers are Adam, AdamW, SGD, Adagrad")
    return _make(plain[name], kind, arguments, parameter_groups)


def _make(
    optimizer: type[torch.optim.Optimizer], kind: str, arguments: dict[str, Any], groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    allowed = [name for name in inspect.signature(optimizer).parameters if name != "params"]
    for name in arguments:
        if name not in allowed:
            raise ValueError(f"optimizer.params.{name}: {kind} has no such parameter; it has {', '.join(allowed)}")
    if isinstance(arguments.get("betas"), list):
        arguments["betas"] = tuple(arguments["betas"])
    return optimizer(groups, **arguments)
