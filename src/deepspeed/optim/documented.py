"""The optimizers under their documented names, with those names' argument lists.

There is one implementation of each: ``DeepSpeedCPUAdam`` and ``FusedAdam`` are :class:`.adam.Adam`, on whatever device
the parameters are, and so on. Arguments that ask for what the implementation does not do are errors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .adagrad import Adagrad
from .adam import Adam
from .lamb import Lamb
from .lion import Lion


class DeepSpeedCPUAdam(Adam):
    """Adam, by default with decoupled weight decay (``adamw_mode``); its states are fp32, also of 16-bit parameters."""

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ):
        _only("DeepSpeedCPUAdam", "amsgrad", amsgrad, False)
        _only("DeepSpeedCPUAdam", "fp32_optimizer_states", fp32_optimizer_states, True)
        super().__init__(model_params, lr, betas, eps, weight_decay, bias_correction, adamw_mode)


class FusedAdam(Adam):
    """Adam, by default with decoupled weight decay (``adam_w_mode``)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ):
        _only("FusedAdam", "amsgrad", amsgrad, False)
        _only("FusedAdam", "set_grad_none", set_grad_none, True)
        super().__init__(params, lr, betas, eps, weight_decay, bias_correction, adam_w_mode)


class FusedLamb(Lamb):
    """LAMB."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ):
        _only("FusedLamb", "amsgrad", amsgrad, False)
        if max_grad_norm:
            raise ValueError("FusedLamb: max_grad_norm is not applied here; set gradient_clipping in the configuration")
        super().__init__(params, lr, betas, eps, weight_decay, max_coeff, min_coeff, bias_correction, eps_inside_sqrt)


class DeepSpeedCPULion(Lion):
    """Lion; its state is fp32."""

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ):
        _only("DeepSpeedCPULion", "fp32_optimizer_states", fp32_optimizer_states, True)
        super().__init__(model_params, lr, betas, weight_decay)


class FusedLion(Lion):
    """Lion."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ):
        _only("FusedLion", "set_grad_none", set_grad_none, True)
        super().__init__(params, lr, betas, weight_decay)


class DeepSpeedCPUAdagrad(Adagrad):
    """Adagrad; its state is fp32."""

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ):
        _only("DeepSpeedCPUAdagrad", "amsgrad", amsgrad, False)
        _only("DeepSpeedCPUAdagrad", "fp32_optimizer_states", fp32_optimizer_states, True)
        super().__init__(model_params, lr=lr, eps=eps, weight_decay=weight_decay)


def _only(kind: str, argument: str, value: object, allowed: object) -> None:
    if value != allowed:
        raise ValueError(f"{kind}: {argument}={value} is not available; leave it at {allowed}")
