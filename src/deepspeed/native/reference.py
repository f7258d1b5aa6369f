"""The kernels in plain torch: what they mean, and what runs on accelerators and where nothing is compiled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_NUMEL = 1 << 16
"""Elements that a kernel converts at a time: small enough for the cache, so that no large temporary appears."""


@dataclass(frozen=True)
class AdamHyper:
    """Hyperparameters of one Adam step. ``step`` counts from 1; ``decoupled`` is AdamW's weight decay;
    ``grad_scale`` multiplies the gradient before anything else."""

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool = True
    bias_correction: bool = True
    grad_scale: float = 1.0

    @property
    def corrections(self) -> tuple[float, float]:
        """``1 - beta1^t`` and ``sqrt(1 - beta2^t)``, both 1 without bias correction."""
        if not self.bias_correction:
            return 1.0, 1.0
        return 1 - self.beta1**self.step, math.sqrt(1 - self.beta2**self.step)


@dataclass(frozen=True)
class LionHyper:
    """Hyperparameters of one Lion step. ``grad_scale`` multiplies the gradient before anything else."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    grad_scale: float = 1.0


@dataclass(frozen=True)
class AdagradHyper:
    """Hyperparameters of one Adagrad step. ``step`` counts from 1; ``grad_scale`` multiplies the gradient before anything
    else."""

    step: int
    lr: float
    lr_decay: float
    eps: float
    weight_decay: float
    grad_scale: float = 1.0

    @property
    def step_size(self) -> float:
        """The learning rate of this step."""
        return self.lr / (1 + (self.step - 1) * self.lr_decay)


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    hyper: AdamHyper,
    param_out: Tensor | None = None,
) -> None:
    """One Adam or AdamW step in place on ``param``, ``exp_avg`` and ``exp_avg_sq`` (1-D, equal sizes).

    The step computes in the states' dtype, fp32 say; ``param`` and ``grad`` may be narrower, and ``param_out`` receives
    the updated parameters too. The formula
    is torch's: ``p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)``, after ``p *= 1 - lr * decay``
    where the decay is decoupled. Source: Kingma & Ba (2015); Loshchilov & Hutter (2019).
    """
    first, second = hyper.corrections
    for start in range(0, param.numel(), CHUNK_NUMEL):
        part = slice(start, start + CHUNK_NUMEL)
        m, v = exp_avg[part], exp_avg_sq[part]
        p, g = param[part].to(m.dtype), grad[part].to(m.dtype)
        if hyper.grad_scale != 1.0:
            g = g * hyper.grad_scale
        if hyper.weight_decay:
            if hyper.decoupled:
                p.mul_(1 - hyper.lr * hyper.weight_decay)
            else:
                g = g.add(p, alpha=hyper.weight_decay)
        m.lerp_(g, 1 - hyper.beta1)
        v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
        p.addcdiv_(m, v.sqrt().div_(second).add_(hyper.eps), value=-hyper.lr / first)
        _put(p, part, param, param_out)


def lion_step(
    param: Tensor, grad: Tensor, exp_avg: Tensor, *, hyper: LionHyper, param_out: Tensor | None = None
) -> None:
    """One Lion step in place on ``param`` and ``exp_avg``, in dtypes as with ``adam_step``: ``p = p * (1 - lr * decay) -
    sign(beta1 * m + (1 - beta1) * g) * lr``, then ``m = beta2 * m + (1 - beta2) * g``. Source: Chen et al. (2023)."""
    for start in range(0, param.numel(), CHUNK_NUMEL):
        part = slice(start, start + CHUNK_NUMEL)
        m = exp_avg[part]
        p, g = param[part].to(m.dtype), grad[part].to(m.dtype) * hyper.grad_scale
        sign = (m * hyper.beta1 + g * (1 - hyper.beta1)).sign_()
        m.copy_(m * hyper.beta2 + g * (1 - hyper.beta2))
        _put(p * (1 - hyper.lr * hyper.weight_decay) - sign * hyper.lr, part, param, param_out)


def adagrad_step(
    param: Tensor, grad: Tensor, sum: Tensor, *, hyper: AdagradHyper, param_out: Tensor | None = None
) -> None:
    """One Adagrad step in place on ``param`` and ``sum``, in dtypes as with ``adam_step``: ``s += g * g``, then
    ``p -= g / (sqrt(s) + eps) * step_size``, with ``g += weight_decay * p`` before. Source: Duchi et al. (2011)."""
    for start in range(0, param.numel(), CHUNK_NUMEL):
        part = slice(start, start + CHUNK_NUMEL)
        s = sum[part]
        p = param[part].to(s.dtype)
        g = grad[part].to(s.dtype) * hyper.grad_scale + p * hyper.weight_decay
        s.add_(g * g)
        _put(p - g / (s.sqrt() + hyper.eps) * hyper.step_size, part, param, param_out)


def _put(values: Tensor, part: slice, param: Tensor, param_out: Tensor | None) -> None:
    """Write the updated ``values`` where they belong."""
    if values.data_ptr() != param[part].data_ptr():
        param[part] = values
    if param_out is not None:
        param_out[part] = values


def scaled_sum(inputs: Sequence[Tensor], *, out: Tensor, scale: float = 1.0, accumulate: bool = False) -> None:
    """``out = scale * (inputs[0] + inputs[1] + ...)``, added in that order and in fp32 at least, or that added to
    ``out``; ``out`` may be one of the inputs. All are 1-D of one size, the inputs of one dtype."""
    accumulator = torch.promote_types(out.dtype, torch.float32)
    for start in range(0, out.numel(), CHUNK_NUMEL):
        part = slice(start, start + CHUNK_NUMEL)
        total = inputs[0][part].to(accumulator)
        for tensor in inputs[1:]:
            total = total + tensor[part]
        if scale != 1.0:
            total = total * scale
        if accumulate:
            out[part] += total
        else:
            out[part] = total


def squared_norm(tensor: Tensor) -> tuple[float, bool]:
    """The sum of squares of a 1-D tensor, accumulated in fp32 within blocks of 65536 elements and in fp64 across them,
    and whether all elements are finite."""
    total = 0.0
    for start in range(0, tensor.numel(), CHUNK_NUMEL):
        block = tensor[start : start + CHUNK_NUMEL]
        wide = block if block.dtype in (torch.float32, torch.float64) else block.to(torch.float32)
        total += torch.dot(wide, wide).item()
    if math.isfinite(total):
        return total, True
    # The squares of large finite elements overflow fp32: look at the elements themselves.
    finite = bool(torch.isfinite(tensor).all().item())
    return (tensor.double().square().sum().item() if finite else total), finite
