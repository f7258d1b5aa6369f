"""Muon for hidden matrices, AdamW for everything else.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..comm.communicator import Communicator
from .adam import update_with_adam
from .segments import FlatShard, Segments

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The quintic iteration's coefficients: the steepest at zero that keep singular values within about [0.7, 1.2]."""


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """About the nearest semi-orthogonal matrix to ``matrix`` (2-D), by ``steps`` Newton-Schulz iterations.

    Computed in fp32 on a CPU and in bf16, which suffices, on accelerators; the result has the matrix's dtype.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.float32 if matrix.device.type == "cpu" else torch.bfloat16)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


def uses_muon(parameter: Tensor) -> bool:
    """Whether Muon updates ``parameter``: as its attribute ``use_muon`` says, else if it is a matrix."""
    return bool(getattr(parameter, "use_muon", parameter.dim() == 2))


class Muon(torch.optim.Optimizer):
    """Steps parameter groups with ``use_muon`` true by Muon and the others by AdamW (``betas``, ``eps``).

    ``muon_lr`` and ``adam_lr`` are their learning rates, ``lr`` where not given; ``momentum`` is Muon's. Groups without
    ``use_muon`` are split by :func:`uses_muon`. The orthogonalized update is scaled by ``sqrt(max(1, rows / columns))``.

    After ``bind`` it steps flat slices: a bucket's momentum updates are all-gathered, and each rank orthogonalizes the
    matrices that its slice has a part in.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        muon_lr: float | None = None,
        adam_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        nesterov: bool = True,
        ns_steps: int = 5,
    ):
        if min(lr, momentum, weight_decay, muon_lr or 0, adam_lr or 0, eps) < 0 or momentum >= 1 or ns_steps < 1:
            raise ValueError(
                f"Muon needs learning rates, weight_decay and eps >= 0, momentum in [0, 1) and ns_steps >= 1, got lr={lr}, "
                f"muon_lr={muon_lr}, adam_lr={adam_lr}, weight_decay={weight_decay}, eps={eps}, momentum={momentum}, "
                f"ns_steps={ns_steps}"
            )
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        rates = {True: lr if muon_lr is None else muon_lr, False: lr if adam_lr is None else adam_lr}
        # A group's own lr stands for both kinds, as the top-level lr does where neither special rate is given.
        split = [{"lr": rates[bool(group["use_muon"])], **group} for group in split_by_muon(groups)]
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "betas": tuple(betas),
            "eps": eps,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "bias_correction": True,
            "adam_w_mode": True,
        }
        super().__init__(split, defaults)
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
        for index, group in enumerate(self.param_groups):
            if group["use_muon"] and self._segments is not None:
                for shard in self._segments.shards:
                    if shard.bucket.group == index:
                        self._step_slice(group, shard, self._segments)
                continue
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not group["use_muon"]:
                    update_with_adam(self.state[parameter], group, parameter, parameter.grad)
                else:
                    update = self._momentum_update(group, parameter, parameter.grad)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(_direction(update, group["ns_steps"]), alpha=-group["lr"])
        return loss

    def _momentum_update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return torch.lerp(gradient, buffer, group["momentum"]) if group["nesterov"] else buffer.clone()

    def _step_slice(self, group: dict[str, Any], shard: FlatShard, segments: Segments) -> None:
        bucket = shard.bucket
        # Also where nothing here has a gradient: another rank needs this one's part of the matrices that both share.
        whole = shard.tensor.new_zeros(bucket.numel)
        own = whole[bucket.slice_range(shard.shard)]
        stepped = []
        for segment in segments.of(shard):
            if segment.tensor.grad is not None:
                own[segment.where] = self._momentum_update(group, segment.tensor, segment.tensor.grad)
                stepped.append(segment)
        if bucket.shards > 1 and self._communicator is not None:
            self._communicator.all_gather(whole, purpose=f"gather of the momentum of {bucket.label}").wait()
        starts = {placement.spec.name: placement.start for placement in bucket.placements}
        for segment in stepped:
            for fragment in segment.fragments:
                start = starts[fragment.spec.name]
                matrix = whole[start : start + fragment.spec.numel].view(fragment.spec.shape)
                stop = fragment.parameter_start + fragment.numel
                direction = _direction(matrix, group["ns_steps"]).reshape(-1)[fragment.parameter_start : stop]
                part = segment.tensor[segment.part(fragment)]
                part.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])


def split_by_muon(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """``groups`` with each that has no ``use_muon`` split into Muon's parameters and the others; empty parts left out."""
    result = []
    for group in groups:
        if "use_muon" in group:
            result.append(group)
            continue
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        for chosen in (True, False):
            part = [parameter for parameter in members if uses_muon(parameter) is chosen]
            if part:
                result.append({**group, "params": part, "use_muon": chosen})
    wrong = [tuple(p.shape) for group in result if group["use_muon"] for p in group["params"] if p.dim() < 2]
    if wrong:
        raise ValueError(f"Muon steps matrices, and use_muon is set on a parameter of shape {wrong[0]}: unset it there")
    return result


def _direction(update: Tensor, steps: int) -> Tensor:
    """The orthogonalized ``update``, scaled; more than two dimensions count as a matrix of rows."""
    matrix = update.reshape(update.size(0), -1)
    scale = max(1.0, matrix.size(0) / matrix.size(1)) ** 0.5
    return orthogonalize(matrix, steps).mul_(scale).view(update.shape)
