"""Lion: the sign of an interpolated momentum. Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

CHUNK_NUMEL = 1 << 16
"""Elements that are updated at a time, so that temporaries stay in the cache."""


class Lion(torch.optim.Optimizer):
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
                    self._update(group, parameter, parameter.grad, 1.0)
        return loss

    @torch.no_grad()
    def step_shard(self, shard: Tensor, gradient: Tensor, *, gradient_scale: float, out: Tensor | None) -> None:
        """Update ``shard``, one of the parameters, from ``gradient`` times ``gradient_scale``; write it to ``out``."""
        for group in self.param_groups:
            if any(parameter is shard for parameter in group["params"]):
                self._update(group, shard, gradient, gradient_scale)
                if out is not None:
                    out.copy_(shard)
                return
        raise ValueError("step_shard() was given a tensor that is in none of the optimizer's parameter groups")

    def _update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor, gradient_scale: float) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        beta1, beta2 = group["betas"]
        if not parameter.is_contiguous():
            _lion(parameter, gradient * gradient_scale, state["exp_avg"], group["lr"], group["weight_decay"], beta1, beta2)
            return
        flat = [tensor.reshape(-1) for tensor in (parameter, gradient, state["exp_avg"])]
        for start in range(0, parameter.numel(), CHUNK_NUMEL):
            p, g, m = (tensor[start : start + CHUNK_NUMEL] for tensor in flat)
            _lion(p, g.to(p.dtype) * gradient_scale, m, group["lr"], group["weight_decay"], beta1, beta2)


def _lion(p: Tensor, g: Tensor, m: Tensor, lr: float, weight_decay: float, beta1: float, beta2: float) -> None:
    p.mul_(1 - lr * weight_decay)
    p.add_(torch.lerp(g, m, beta1).sign_(), alpha=-lr)
    m.lerp_(g, 1 - beta2)
