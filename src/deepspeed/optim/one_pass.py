"""Optimizers that update a tensor in one pass over memory: what Adam, Lion and Adagrad have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pass:
    """What one pass reads and writes: ``flat``, a parameter's memory, is updated from ``gradient`` times ``gradient_scale`` and
    written to ``out`` too, where given. All are 1-D, contiguous and of one size."""

    flat: Tensor
    gradient: Tensor
    gradient_scale: float = 1.0
    out: Tensor | None = None


class OnePassOptimizer(torch.optim.Optimizer):
    """Steps on ordinary parameters as torch's optimizers do, and on a flat fp32 slice in one pass that reads a gradient of
    any floating dtype and writes the 16-bit parameters too (``step_shard``). States are at least fp32.

    A kind of it says in ``_update`` what one pass is.
    """

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
                    gradient = parameter.grad.reshape(-1)
                    update_flat(parameter, partial(self._step_flat, group, parameter, gradient))
        return loss

    @torch.no_grad()
    def step_shard(self, shard: Tensor, gradient: Tensor, *, gradient_scale: float, out: Tensor | None) -> None:
        """Update ``shard``, one of the parameters, from ``gradient`` times ``gradient_scale``; write it to ``out``."""
        for group in self.param_groups:
            if any(parameter is shard for parameter in group["params"]):
                self._update(group, shard, Pass(shard, gradient, gradient_scale, out))
                return
        raise ValueError("step_shard() was given a tensor that is in none of the optimizer's parameter groups")

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's optimizers do, but states keep their dtype where the parameters are 16-bit."""
        super().load_state_dict(state_dict)
        saved = [state_dict["state"].get(index, {}) for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter, state in zip(parameters, saved, strict=True):
            for key, value in state.items():
                if isinstance(value, Tensor) and self.state[parameter][key].dtype != value.dtype:
                    self.state[parameter][key] = value.to(parameter.device, copy=True)

    def _step_flat(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor, flat: Tensor) -> None:
        self._update(group, parameter, Pass(flat, gradient))

    def _update(self, group: dict[str, Any], parameter: Tensor, values: Pass) -> None:
        """Update ``values`` of ``parameter`` with the options in ``group``."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it updates a tensor")


def new_state(parameter: Tensor, value: float = 0.0) -> Tensor:
    """A state of the shape of ``parameter``, contiguous and at least fp32, filled with ``value``."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return torch.full_like(parameter, value, dtype=wide, memory_format=torch.contiguous_format)


def update_flat(parameter: Tensor, update: Callable[[Tensor], object]) -> None:
    """Call ``update`` with the 1-D memory of ``parameter``, or with a copy that it gets back where it is not contiguous."""
    flat = parameter.reshape(-1)
    update(flat)
    if not parameter.is_contiguous():
        parameter.copy_(flat.view(parameter.shape))
