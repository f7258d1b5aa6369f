"""Adam on torch's fused kernel: for accelerators, and for CPU tensors where the core is not compiled."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from .reference import AdamHyper

CHUNK_NUMEL = 1 << 22
"""Elements updated by one call: a gradient that must be widened or scaled first costs a temporary of this size."""


def supports(param: Tensor, state: Tensor, hyper: AdamHyper) -> bool:
    """Whether torch has a fused kernel for this step: it always corrects the bias, and has one dtype."""
    return hyper.bias_correction and param.dtype == state.dtype and param.device.type in ("cpu", "cuda")


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    hyper: AdamHyper,
    param_out: Tensor | None = None,
) -> None:
    """What ``reference.adam_step`` does, for a ``hyper`` that :func:`supports` allows."""
    update = adamw if hyper.decoupled else adam
    for start in range(0, param.numel(), CHUNK_NUMEL):
        part = slice(start, start + CHUNK_NUMEL)
        gradient = grad[part].to(param.dtype)
        if hyper.grad_scale != 1.0:
            gradient = gradient * hyper.grad_scale
        update(
            [param[part]],
            [gradient],
            [exp_avg[part]],
            [exp_avg_sq[part]],
            [],
            [torch.tensor(hyper.step - 1.0, device=param.device)],
            fused=True,
            amsgrad=False,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            lr=hyper.lr,
            weight_decay=hyper.weight_decay,
            eps=hyper.eps,
            maximize=False,
        )
        if param_out is not None:
            param_out[part] = param[part]
