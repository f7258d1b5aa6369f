"""Lion: the sign of an interpolated momentum. Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .. import native
from .one_pass import OnePassOptimizer, Pass, new_state


class Lion(OnePassOptimizer):
    """``p = p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)``, then
    ``m = beta2 * m + (1 - beta2) * g``; on ordinary parameters or on flat fp32 slices."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        if lr < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"Lion needs lr, weight_decay >= 0 and betas in [0, 1), got lr={lr}, weight_decay={weight_decay}, "
                f"betas={betas}"
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], parameter: Tensor, values: Pass) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = new_state(parameter)
        beta1, beta2 = group["betas"]
        hyper = native.LionHyper(float(group["lr"]), beta1, beta2, group["weight_decay"], values.gradient_scale)
        native.lion_step(values.flat, values.gradient, state["exp_avg"].view(-1), hyper=hyper, param_out=values.out)
