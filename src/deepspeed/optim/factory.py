"""From the configuration's ``optimizer`` section to an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .arguments import checked_arguments, closest
from .lamb import Lamb
from .lion import Lion
from .muon import Muon, split_by_muon
from .sharding import ELEMENTWISE


def _adam(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    adam_w_mode: bool = True,
    torch_adam: bool = False,
    amsgrad: bool = False,
) -> torch.optim.Optimizer:
    if amsgrad:
        raise ValueError("optimizer.params.amsgrad is true: the AMSGrad variant is not available; set it to false")
    if not torch_adam:
        return Adam(params, lr, betas, eps, weight_decay, bias_correction, adam_w_mode)
    if not bias_correction:
        raise ValueError("optimizer.params.torch_adam: torch's Adam always corrects bias; leave bias_correction true")
    kind = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    return kind(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _adamw(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
    adam_w_mode: bool = True,
    torch_adam: bool = False,
    amsgrad: bool = False,
) -> torch.optim.Optimizer:
    # Configurations in the wild carry adam_w_mode false under AdamW; the type's name has always decided there.
    return _adam(params, lr, betas, eps, weight_decay, bias_correction, True, torch_adam, amsgrad)


OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    **{kind.__name__: kind for kind in ELEMENTWISE},
    Adam.__name__: _adam,
    AdamW.__name__: _adamw,
    "Adagrad": Adagrad,
    "Lion": Lion,
    "Lamb": Lamb,
    "Muon": Muon,
}
"""Every optimizer that a configuration can name: torch's elementwise ones under their own names, and these."""


def build_optimizer(
    type: str, params: Mapping[str, object], parameter_groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The optimizer that a configuration's ``optimizer`` section names, in any case, on ``parameter_groups``, whose own
    options override ``params``.

    Raises ValueError for an unknown type or argument, with the nearest known one.
    """
    by_name = {name.lower(): name for name in OPTIMIZERS}
    name = by_name.get(type.lower())
    if name is None:
        raise ValueError(f"optimizer.type '{type}' is unknown.{closest(type, OPTIMIZERS)} Available: {', '.join(OPTIMIZERS)}")
    kind = OPTIMIZERS[name]
    return kind(parameter_groups, **checked_arguments("optimizer", name, kind, params, given=("params",)))


def split_parameter_groups(type: str, parameter_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups as the optimizer ``type`` needs them before the layout is built: Muon's matrices apart."""
    return split_by_muon(parameter_groups) if type.lower() == "muon" else parameter_groups
