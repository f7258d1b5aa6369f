"""Adam and AdamW in one pass over memory, on the native kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import native
from .one_pass import OnePassOptimizer, Pass, new_state, update_flat


class Adam(OnePassOptimizer):
    """Adam with L2 regularization or, with ``adam_w_mode``, decoupled weight decay (AdamW).

    Source: Kingma & Ba (2015); Loshchilov & Hutter (2019)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
    ):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"Adam needs lr, eps, weight_decay >= 0 and betas in [0, 1), got lr={lr}, eps={eps}, "
                f"weight_decay={weight_decay}, betas={betas}"
            )
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "adam_w_mode": adam_w_mode,
        }
        super().__init__(params, defaults)

    def _update(self, group: dict[str, Any], parameter: Tensor, values: Pass) -> None:
        _step(self.state[parameter], group, parameter, values)


class AdamW(Adam):
    """Adam with decoupled weight decay, 0.01 by default."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, bias_correction, adam_w_mode=True)


def update_with_adam(state: dict[str, Any], group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
    """One Adam step of ``parameter`` with the options in ``group``; ``state`` is filled at the first."""
    update_flat(parameter, lambda flat: _step(state, group, parameter, Pass(flat, gradient.reshape(-1))))


def _step(state: dict[str, Any], group: dict[str, Any], parameter: Tensor, values: Pass) -> None:
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = new_state(parameter)
        state["exp_avg_sq"] = new_state(parameter)
    state["step"] += 1
    beta1, beta2 = group["betas"]
    hyper = native.AdamHyper(
        step=int(state["step"].item()),
        lr=float(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=group["adam_w_mode"],
        bias_correction=group["bias_correction"],
        grad_scale=values.gradient_scale,
    )
    moments = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    native.adam_step(values.flat, values.gradient, *moments, hyper=hyper, param_out=values.out)
