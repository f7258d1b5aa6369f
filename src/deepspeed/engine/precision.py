"""The precision of a training run, read once from the configuration."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DeepSpeedConfig
from ..optim.loss_scaling import DynamicLossScaler, LossScaler, NoLossScaler, StaticLossScaler

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Data types by the names that the configuration uses."""


@dataclass(frozen=True)
class PrecisionPolicy:
    """``model_dtype`` None leaves the model's floating-point dtypes as they are; ``autocast_dtype`` None runs no
    autocast. ``cast_inputs`` converts floating-point inputs of the model to ``model_dtype``."""

    model_dtype: torch.dtype | None = None
    autocast_dtype: torch.dtype | None = None
    gradient_dtype: torch.dtype | None = None
    communication_dtype: torch.dtype | None = None
    cast_inputs: bool = False

    @staticmethod
    def from_config(config: DeepSpeedConfig) -> PrecisionPolicy:
        """The policy that the sections fp16, bf16, torch_autocast, data_types and communication_data_type describe.

        Gradients of a 16-bit model are kept in fp32 while several micro-batches accumulate, unless
        ``data_types.grad_accum_dtype`` says otherwise; with a single micro-batch there is nothing to accumulate and
        they keep the model's dtype (:meth:`kept_dtype`).
        """
        model_dtype = torch.float16 if config.fp16.enabled else torch.bfloat16 if config.bf16.enabled else None
        return PrecisionPolicy(
            model_dtype=model_dtype,
            autocast_dtype=_named(config.torch_autocast.dtype) if config.torch_autocast.enabled else None,
            gradient_dtype=_named(config.data_types.grad_accum_dtype),
            communication_dtype=_named(config.communication_data_type),
            cast_inputs=config.fp16.enabled and config.fp16.auto_cast,
        )

    def kept_dtype(self, accumulation_steps: int) -> torch.dtype | None:
        """The dtype in which gradients are kept over ``accumulation_steps`` micro-batches; None for the model's."""
        if self.gradient_dtype is None and self.model_dtype is not None and accumulation_steps > 1:
            return torch.float32
        return self.gradient_dtype

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        """The dtype that ``tensor``, a parameter or buffer of the model, has under this policy."""
        return self.model_dtype if self.model_dtype is not None and tensor.is_floating_point() else tensor.dtype

    def cast_module(self, module: nn.Module, *, keep: Callable[[Tensor], bool]) -> None:
        """Convert the module's parameters and buffers, but for those that ``keep`` names (their owner converts
        them)."""
        for tensor in [*module.parameters(), *module.buffers()]:
            if self.dtype_of(tensor) != tensor.dtype and not keep(tensor):
                tensor.data = tensor.data.to(self.dtype_of(tensor))

    def cast(self, value: Any) -> Any:
        """``value`` with every floating-point tensor in it converted to the model's dtype, where inputs are cast."""
        if not self.cast_inputs:
            return value
        if isinstance(value, Tensor):
            return value.to(self.dtype_of(value))
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(self.cast(item) for item in value)
        if type(value) is dict:
            return {key: self.cast(item) for key, item in value.items()}
        return value

    def autocast(self, device_type: str) -> AbstractContextManager[object]:
        """The context in which the model's forward runs."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.autocast_dtype)


def build_loss_scaler(config: DeepSpeedConfig) -> LossScaler:
    """The loss scaler that the section fp16 describes, for fp16 models and for autocast to fp16; none elsewhere."""
    fp16, autocast = config.fp16, config.torch_autocast
    if not fp16.enabled and not (autocast.enabled and autocast.dtype == "fp16"):
        return NoLossScaler()
    if fp16.loss_scale:
        return StaticLossScaler(fp16.loss_scale)
    return DynamicLossScaler(
        initial_scale_power=fp16.initial_scale_power,
        loss_scale_window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
        min_loss_scale=fp16.min_loss_scale,
    )


def _named(name: str | None) -> torch.dtype | None:
    return None if name is None else DTYPES[name]
