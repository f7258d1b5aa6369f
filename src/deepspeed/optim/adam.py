"""Adam and AdamW in one pass over memory, on the native kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import native


class Adam(torch.optim.Optimizer):
    """Adam with L2 regularization or, with ``adam_w_mode``, decoupled weight decay (AdamW).

    Steps on ordinary parameters as ``torch.optim.Adam`` and ``AdamW`` do, and on a flat fp32 slice in one pass that
    reads a gradient of any floating dtype and writes the 16-bit parameters too (``step_shard``).
    """

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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter, parameter.grad, 1.0, None)
        return loss

    @torch.no_grad()
    def step_shard(self, shard: Tensor, gradient: Tensor, *, gradient_scale: float, out: Tensor | None) -> None:
        """Update ``shard``, one of the parameters, from ``gradient`` times ``gradient_scale``; write it to ``out``."""
        for group in self.param_groups:
            if any(parameter is shard for parameter in group["params"]):
                self._update(group, shard, gradient, gradient_scale, out)
                return
        raise ValueError("step_shard() was given a tensor that is in none of the optimizer's parameter groups")

    def _update(
        self, group: dict[str, Any], parameter: Tensor, gradient: Tensor, gradient_scale: float, out: Tensor | None
    ) -> None:
        update_with_adam(self.state[parameter], group, parameter, gradient, gradient_scale, out)


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


def update_with_adam(
    state: dict[str, Any],
    group: dict[str, Any],
    parameter: Tensor,
    gradient: Tensor,
    gradient_scale: float,
    out: Tensor | None,
) -> None:
    """One Adam step of ``parameter`` with the options in ``group``; ``state`` is filled at the first."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
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
        grad_scale=gradient_scale,
    )
    flat = parameter.reshape(-1)
    moments = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    native.adam_step(flat, gradient.reshape(-1), *moments, hyper=hyper, param_out=out)
    if not parameter.is_contiguous():
        parameter.copy_(flat.view(parameter.shape))
