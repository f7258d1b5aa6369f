"""Sections ``fp16``, ``bf16``, ``amp``, ``torch_autocast`` and ``data_types``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .section import Int, OpenSection, Section

DtypeName = Literal["fp32", "fp16", "bf16", "float32", "float16", "bfloat16"]


class Fp16Config(Section):
    """fp16 parameters and gradients with fp32 masters and loss scaling."""

    enabled: bool = Field(False, description="Train in fp16.")
    auto_cast: bool = Field(False, description="Convert floating-point inputs of the model to fp16.")
    loss_scale: float = Field(0.0, ge=0, description="A constant loss scale; 0 scales dynamically.")
    initial_scale_power: Int = Field(16, ge=0, description="The dynamic scale starts at 2 to this power.")
    loss_scale_window: Int = Field(1000, ge=1, description="Steps without overflow before the scale doubles.")
    hysteresis: Int = Field(2, ge=1, description="Overflows before the scale halves.")
    consecutive_hysteresis: bool = Field(
        False, description="Refill the hysteresis at every step without overflow, not only when the scale doubles."
    )
    min_loss_scale: float = Field(1.0, gt=0, description="The dynamic scale does not fall below this.")
    fp16_master_weights_and_grads: bool = Field(False, description="Keep masters and gradients in fp16.")


class Bf16Config(Section):
    """bf16 parameters and gradients with fp32 masters."""

    enabled: bool = Field(False, description="Train in bf16.")
    immediate_grad_update: bool = Field(
        True, description="Gradients enter their bucket as soon as they are computed; true is the only mode."
    )
    check_grad_overflow: bool = Field(True, description="Skip steps with a non-finite gradient; true is the only mode.")
    bf16_master_weights_and_grads: bool = Field(False, description="Keep masters and gradients in bf16.")
    bf16_optimizer_states: bool = Field(False, description="Keep optimizer states in bf16.")


class AmpConfig(OpenSection):
    """NVIDIA Apex mixed precision."""


class TorchAutocastConfig(Section):
    """Run the model's forward under ``torch.autocast``; parameters keep their dtype."""

    enabled: bool = Field(False, description="Run forward under torch.autocast.")
    dtype: DtypeName = Field("bfloat16", description="The dtype of autocast: bfloat16 or float16.")
    lower_precision_safe_modules: list[str] | None = Field(
        None, description="Module classes whose parameters are communicated in the autocast dtype."
    )


class DataTypesConfig(Section):
    """Data types of states."""

    grad_accum_dtype: DtypeName | None = Field(
        None,
        description="The dtype in which gradients accumulate. By default fp32 where several micro-batches of a 16-bit "
        "model accumulate, else the model's dtype.",
    )
