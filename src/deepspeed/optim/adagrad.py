"""Adagrad: each element's rate falls with the sum of its squared gradients. Source: Duchi et al. (2011)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import native
from .one_pass import OnePassOptimizer, Pass, new_state


class Adagrad(OnePassOptimizer):
    """What ``torch.optim.Adagrad`` is: ``s += g * g``, then ``p -= lr / (1 + (step - 1) * lr_decay) * g / (sqrt(s) + eps)``,
    with L2 regularization; on ordinary parameters or on flat fp32 slices."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        maximize: bool = False,
    ):
        if min(lr, lr_decay, weight_decay, initial_accumulator_value, eps) < 0:
            raise ValueError(
                f"Adagrad needs numbers >= 0, got lr={lr}, lr_decay={lr_decay}, weight_decay={weight_decay}, "
                f"initial_accumulator_value={initial_accumulator_value}, eps={eps}"
            )
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _update(self, group: dict[str, Any], parameter: Tensor, values: Pass) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["sum"] = new_state(parameter, group["initial_accumulator_value"])
        state["step"] += 1
        hyper = native.AdagradHyper(
            step=int(state["step"].item()),
            lr=float(group["lr"]),
            lr_decay=group["lr_decay"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=-values.gradient_scale if group["maximize"] else values.gradient_scale,
        )
        native.adagrad_step(values.flat, values.gradient, state["sum"].view(-1), hyper=hyper, param_out=values.out)
