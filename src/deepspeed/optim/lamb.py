"""LAMB: Adam's direction, scaled for each parameter by the ratio of its norm to the direction's.

Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..comm.communicator import Communicator
from .segments import Segments


class Lamb(torch.optim.Optimizer):
    """LAMB on ordinary parameters, or after ``bind`` on flat slices that cut parameters anywhere.

    The trust ratio ``norm(p) / norm(direction)`` is kept within ``min_coeff`` and ``max_coeff`` and is 1 where either
    norm is 0. With slices, every rank adds the squares of its fragments and one small collective sums them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        bias_correction: bool = True,
        eps_inside_sqrt: bool = False,
    ):
        if lr < 0 or eps < 0 or weight_decay < 0 or not 0 <= min_coeff <= max_coeff:
            raise ValueError(
                f"Lamb needs lr, eps, weight_decay >= 0 and 0 <= min_coeff <= max_coeff, got lr={lr}, eps={eps}, "
                f"weight_decay={weight_decay}, min_coeff={min_coeff}, max_coeff={max_coeff}"
            )
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Lamb needs betas in [0, 1), got {betas}")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
            "bias_correction": bias_correction,
            "eps_inside_sqrt": eps_inside_sqrt,
        }
        super().__init__(params, defaults)
        self._segments: Segments | None = None
        self._communicator: Communicator | None = None

    def bind(self, segments: Segments, communicator: Communicator) -> None:
        """Learn the segments in the parameter groups, and the ranks that hold the rest."""
        self._segments = segments
        self._communicator = communicator

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. With slices, a collective call."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group, parameter in stepped:
            self._update_moments(group, parameter)
        norms = self._norms(stepped)
        # The direction is computed again rather than kept: keeping it would cost another fp32 copy of all slices.
        for group, parameter in stepped:
            direction = self._direction(group, parameter).view(-1)
            for key, where in self._parts(parameter):
                ratio = _trust_ratio(*norms[key], group["min_coeff"], group["max_coeff"])
                direction[where].mul_(-group["lr"] * ratio)
                parameter.reshape(-1)[where].add_(direction[where])
        return loss

    def _update_moments(self, group: dict[str, Any], parameter: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)

    def _direction(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        beta1, beta2 = group["betas"]
        step = int(state["step"].item())
        first, second = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
        if group["eps_inside_sqrt"]:
            denominator = state["exp_avg_sq"].div(second).add_(group["eps"]).sqrt_()
        else:
            denominator = state["exp_avg_sq"].sqrt().div_(math.sqrt(second)).add_(group["eps"])
        direction = torch.div(state["exp_avg"], denominator, out=denominator).div_(first)
        return direction.add_(parameter, alpha=group["weight_decay"])

    def _parts(self, parameter: Tensor) -> list[tuple[object, slice]]:
        """The model's parameters within ``parameter``, by a key, and their elements."""
        segment = self._segments.holding(parameter) if self._segments is not None else None
        if segment is None:
            return [(parameter, slice(0, parameter.numel()))]
        return [(fragment.spec.name, segment.part(fragment)) for fragment in segment.fragments]

    def _norms(self, stepped: Sequence[tuple[dict[str, Any], Tensor]]) -> dict[object, tuple[float, float]]:
        """The norms of each whole parameter and of its direction, by the keys of ``_parts``."""
        shards = self._segments.shards if self._segments is not None else ()
        names = [p.spec.name for shard in shards for p in shard.bucket.placements]
        squares: dict[object, tuple[float, float]] = dict.fromkeys(names, (0.0, 0.0))
        for group, parameter in stepped:
            direction = self._direction(group, parameter).view(-1)
            for key, where in self._parts(parameter):
                squares[key] = _square(parameter.reshape(-1)[where]), _square(direction[where])
        if any(shard.bucket.shards > 1 for shard in shards) and self._communicator is not None:
            values = torch.tensor([squares[name] for name in names], dtype=torch.float64, device=shards[0].tensor.device)
            sums = self._communicator.sum_in_rank_order(values.view(-1), purpose="agreement on LAMB's norms")
            total = sums.view(-1, 2).tolist()
            squares.update({name: (first, second) for name, (first, second) in zip(names, total, strict=True)})
        return {key: (math.sqrt(first), math.sqrt(second)) for key, (first, second) in squares.items()}


def _square(values: Tensor) -> float:
    return values.square().sum(dtype=torch.float64).item()


def _trust_ratio(weight_norm: float, direction_norm: float, minimum: float, maximum: float) -> float:
    if weight_norm == 0 or direction_norm == 0:
        return 1.0
    return min(max(weight_norm / direction_norm, minimum), maximum)
