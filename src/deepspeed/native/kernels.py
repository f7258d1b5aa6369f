"""Which implementation a kernel runs on: the compiled core for CPU tensors, torch's own kernels for everything else.

The core takes addresses and trusts them, so the checks are here. It is compiled when the package is installed; without it
(no compiler then, or ``DEEPSPEED_NATIVE=0`` now) everything works on torch's own kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import fused, reference
from .core import load as _load
from .reference import AdagradHyper, AdamHyper, LionHyper

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes that the core computes on, by their number in ``csrc/kernels.hpp``."""


def available() -> bool:
    """Whether the compiled core is used for CPU tensors."""
    return _load()[0] is not None


def status() -> str:
    """One line: the compiled core and its instruction set, or why torch's kernels run instead."""
    core, reason = _load()
    return f"torch kernels: {reason}" if core is None else f"compiled core, {core.instruction_set()} instructions"


def _check_flat(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless all are 1-D, contiguous, of one size and on one device."""
    (first_name, first), *_ = tensors.items()
    for name, tensor in tensors.items():
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be 1-D and contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}: "
                "pass a flat tensor, such as tensor.view(-1)"
            )
        if tensor.numel() != first.numel():
            raise ValueError(
                f"{name} has {tensor.numel()} elements and {first_name} {first.numel()}: they must be of equal size"
            )
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} and {first_name} on {first.device}: move one to the other")


def _check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} is {tensor.dtype}, expected one of {', '.join(map(str, allowed))}")


def _core_for(*tensors: Tensor) -> ModuleType | None:
    """The core, if it can work on all of these."""
    if all(tensor.device.type == "cpu" and tensor.dtype in DTYPE_CODES for tensor in tensors):
        return _load()[0]
    return None


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    hyper: AdamHyper,
    param_out: Tensor | None = None,
) -> None:
    """One Adam or AdamW step in place on ``param``, ``exp_avg`` and ``exp_avg_sq`` (1-D, contiguous, of one size).

    The states have the parameter's dtype or fp32. ``grad`` may be fp32, bf16, fp16 or of the states' dtype; ``param_out``,
    if given, receives the updated parameters in its dtype in the same pass. With fp32 states on a CPU it runs compiled, on
    ``torch.get_num_threads()`` threads; the formula is that of ``reference.adam_step``. TypeError and ValueError name the
    tensor that does not fit.
    """
    _check_step(param, grad, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, param_out)
    if hyper.step < 1:
        raise ValueError(f"hyper.step is {hyper.step}: Adam's steps count from 1")
    core = _core_for_step(param, grad, exp_avg, param_out)
    if core is None:
        step = fused.adam_step if fused.supports(param, exp_avg, hyper) else reference.adam_step
        step(param, grad, exp_avg, exp_avg_sq, hyper=hyper, param_out=param_out)
        return
    first, second = hyper.corrections
    core.adam_step(
        _addresses(core, param, grad, param_out),
        exp_avg=exp_avg.data_ptr(),
        exp_avg_sq=exp_avg_sq.data_ptr(),
        grad_scale=hyper.grad_scale,
        decay=1 - hyper.lr * hyper.weight_decay if hyper.decoupled else 1.0,
        l2=0.0 if hyper.decoupled else hyper.weight_decay,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        second=1 / second,
        eps=hyper.eps,
        step_size=-hyper.lr / first,
        threads=torch.get_num_threads(),
    )


def lion_step(
    param: Tensor, grad: Tensor, exp_avg: Tensor, *, hyper: LionHyper, param_out: Tensor | None = None
) -> None:
    """One Lion step in place on ``param`` and ``exp_avg``: ``reference.lion_step``, on tensors as in ``adam_step``. Compiled,
    the bits are the same."""
    _check_step(param, grad, {"exp_avg": exp_avg}, param_out)
    core = _core_for_step(param, grad, exp_avg, param_out)
    if core is None:
        reference.lion_step(param, grad, exp_avg, hyper=hyper, param_out=param_out)
        return
    core.lion_step(
        _addresses(core, param, grad, param_out),
        exp_avg=exp_avg.data_ptr(),
        grad_scale=hyper.grad_scale,
        decay=1 - hyper.lr * hyper.weight_decay,
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        threads=torch.get_num_threads(),
    )


def adagrad_step(
    param: Tensor, grad: Tensor, sum: Tensor, *, hyper: AdagradHyper, param_out: Tensor | None = None
) -> None:
    """One Adagrad step in place on ``param`` and ``sum``: ``reference.adagrad_step``, on tensors as in ``adam_step``."""
    _check_step(param, grad, {"sum": sum}, param_out)
    core = _core_for_step(param, grad, sum, param_out)
    if core is None:
        reference.adagrad_step(param, grad, sum, hyper=hyper, param_out=param_out)
        return
    core.adagrad_step(
        _addresses(core, param, grad, param_out),
        sum=sum.data_ptr(),
        grad_scale=hyper.grad_scale,
        l2=hyper.weight_decay,
        eps=hyper.eps,
        step_size=hyper.step_size,
        threads=torch.get_num_threads(),
    )


def _check_step(param: Tensor, grad: Tensor, states: dict[str, Tensor], param_out: Tensor | None) -> None:
    tensors = {"param": param, "grad": grad, **states}
    if param_out is not None:
        tensors["param_out"] = param_out
    _check_flat(tensors)
    _check_dtype("param", param, (torch.float32, torch.float64, torch.bfloat16, torch.float16))
    wide = torch.promote_types(param.dtype, torch.float32)
    first, *others = states
    _check_dtype(first, states[first], tuple({param.dtype: None, wide: None}))
    for name in others:
        _check_dtype(name, states[name], (states[first].dtype,))
    _check_dtype("grad", grad, (*DTYPE_CODES, states[first].dtype))


def _core_for_step(param: Tensor, grad: Tensor, state: Tensor, param_out: Tensor | None) -> ModuleType | None:
    tensors = (param, grad, state) if param_out is None else (param, grad, state, param_out)
    return _core_for(*tensors) if state.dtype == torch.float32 else None


def _addresses(core: ModuleType, param: Tensor, grad: Tensor, out: Tensor | None) -> object:
    return core.StepTensors(
        param=param.data_ptr(),
        param_dtype=DTYPE_CODES[param.dtype],
        grad=grad.data_ptr(),
        grad_dtype=DTYPE_CODES[grad.dtype],
        out=0 if out is None else out.data_ptr(),
        out_dtype=0 if out is None else DTYPE_CODES[out.dtype],
        numel=param.numel(),
    )


def scaled_sum(inputs: Sequence[Tensor], *, out: Tensor, scale: float = 1.0, accumulate: bool = False) -> None:
    """``out = scale * (inputs[0] + inputs[1] + ...)``, added in that order and in fp32 at least; with ``accumulate`` the
    result is added to ``out``, which is then fp32 (or fp64, as the inputs).

    All are 1-D, contiguous and of one size; the inputs have one dtype, ``out`` the same or a wider one. ``out`` may be one
    of the inputs, but not overlap one in part. fp32 is bit for bit what the same expression gives in torch.
    """
    if not inputs:
        raise ValueError("scaled_sum() was given no inputs: it needs at least one")
    _check_flat({"out": out, **{f"inputs[{index}]": tensor for index, tensor in enumerate(inputs)}})
    dtype = inputs[0].dtype
    for index, tensor in enumerate(inputs):
        _check_dtype(f"inputs[{index}]", tensor, (dtype,))
    wide = torch.promote_types(dtype, torch.float32)
    _check_dtype("out", out, (wide,) if accumulate else tuple({dtype: None, wide: None}))
    core = _core_for(out, *inputs)
    if core is None:
        reference.scaled_sum(inputs, out=out, scale=scale, accumulate=accumulate)
        return
    core.scaled_sum(
        inputs=[tensor.data_ptr() for tensor in inputs],
        dtype=DTYPE_CODES[dtype],
        out=out.data_ptr(),
        out_dtype=DTYPE_CODES[out.dtype],
        numel=out.numel(),
        scale=scale,
        accumulate=accumulate,
        threads=torch.get_num_threads(),
    )


def squared_norm(tensor: Tensor) -> tuple[float, bool]:
    """The sum of squares of a 1-D contiguous floating tensor, and whether all its elements are finite.

    Compiled: accumulated in fp64 in a fixed order, so the result is the same for any number of threads.
    """
    _check_flat({"tensor": tensor})
    core = _core_for(tensor)
    if core is None:
        return reference.squared_norm(tensor)
    total = core.squared_sum(
        data=tensor.data_ptr(),
        dtype=DTYPE_CODES[tensor.dtype],
        numel=tensor.numel(),
        threads=torch.get_num_threads(),
    )
    # The square of any finite fp32 is finite in fp64, and so is the sum of as many as fit in memory.
    return total, total - total == 0.0
