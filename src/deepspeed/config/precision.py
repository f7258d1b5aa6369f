"""Sections ``fp16``, ``bf16``, ``amp``, ``torch_autocast`` and ``data_types``."""

from __future__ import annotations

from typing import Annotated, Literal

from .section import DtypeNames, Int, OpenSection, Real, Section, key

DtypeName = Annotated[Literal["fp32", "fp16", "bf16"], DtypeNames]
"""A dtype. "float32", "torch.float16", "half" and the like are understood too."""

HalfName = Annotated[Literal["fp16", "bf16"], DtypeNames]
"""A 16-bit dtype, with the same other names."""


class Fp16Config(Section):
    """fp16 parameters and gradients with fp32 masters and loss scaling."""

    enabled: bool = key(False, "Train in fp16.")
    auto_cast: bool = key(False, "Convert floating-point inputs of the model to fp16.")
    loss_scale: Real = key(0.0, "A constant loss scale; 0 scales dynamically.", unit="factor", ge=0)
    initial_scale_power: Int = key(16, "The dynamic scale starts at 2 to this power.", unit="power of 2", ge=0)
    loss_scale_window: Int = key(1000, "Steps without overflow before the scale doubles.", unit="optimizer steps", ge=1)
    hysteresis: Int = key(2, "The scale halves at this overflow; the ones before are tolerated.", unit="overflows", ge=1)
    consecutive_hysteresis: bool = key(
        False, "Refill the hysteresis at every step without overflow, not only when the scale doubles."
    )
    min_loss_scale: Real = key(1.0, "The dynamic scale does not fall below this.", unit="factor", gt=0)
    fp16_master_weights_and_grads: bool = key(False, "Keep masters and gradients in fp16.")


class Bf16Config(Section):
    """bf16 parameters and gradients with fp32 masters."""

    enabled: bool = key(False, "Train in bf16.")
    immediate_grad_update: bool = key(True, "Gradients enter their bucket as soon as they are computed.")
    check_grad_overflow: bool = key(True, "Skip steps with a non-finite gradient.")
    bf16_master_weights_and_grads: bool = key(False, "Keep masters and gradients in bf16.")
    bf16_optimizer_states: bool = key(False, "Keep optimizer states in bf16.")


class AmpConfig(OpenSection):
    """NVIDIA Apex mixed precision; its other keys are Apex's."""

    enabled: bool = key(False, "Train with Apex.")


class TorchAutocastConfig(Section):
    """Run the model's forward under ``torch.autocast``; parameters keep their dtype. With fp16 the loss is scaled as
    the keys of ``fp16`` say."""

    enabled: bool = key(False, "Run forward under torch.autocast.")
    dtype: HalfName = key("bf16", "The dtype of autocast.")
    lower_precision_safe_modules: list[str] | None = key(
        None, "Module classes whose parameters are communicated in the autocast dtype."
    )


class DataTypesConfig(Section):
    """Data types of states (docs/optimizers.md)."""

    grad_accum_dtype: DtypeName | None = key(
        None,
        "The dtype in which gradients accumulate. Left out: fp32 where several micro-batches of a 16-bit model "
        "accumulate, else the model's dtype.",
    )
    optimizer_state_bits: Literal[8, 32] = key(
        32,
        "8 keeps the optimizer's states as block-wise 8-bit numbers between steps, at any stage and on any tier.",
        unit="bits",
    )
    split_master: bool = key(
        False,
        "Keep of the fp32 master of a bf16 parameter the 16 bits that the parameter lacks: the same in 4 bytes, not 6.",
    )

    @property
    def packs(self) -> bool:
        """Whether any state is packed while nobody computes with it."""
        return self.split_master or self.optimizer_state_bits == 8
