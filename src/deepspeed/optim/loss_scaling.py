"""Loss scaling for fp16: keep small gradients above fp16's underflow, and large ones below its overflow.

Source: Micikevicius et al., "Mixed Precision Training" (2018), section 3.2; the ``fp16`` section of the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class LossScaler(Protocol):
    """A factor for losses that adapts to overflows."""

    @property
    def scale(self) -> float:
        """The factor."""

    def update(self, overflow: bool) -> None:
        """Learn whether the step's gradients overflowed."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""


class StaticLossScaler:
    """A constant factor."""

    def __init__(self, scale: float):
        self._scale = float(scale)

    @property
    def scale(self) -> float:
        """The factor."""
        return self._scale

    def update(self, overflow: bool) -> None:
        """A constant does not adapt."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"scale": self._scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore: the factor is the configuration's."""


class NoLossScaler(StaticLossScaler):
    """The factor 1."""

    def __init__(self) -> None:
        super().__init__(1.0)


class DynamicLossScaler:
    """Halves the factor at overflows and doubles it after ``loss_scale_window`` steps without.

    The first ``hysteresis - 1`` overflows are tolerated without halving. What was tolerated counts until a doubling,
    or with ``consecutive_hysteresis`` until the next step without overflow. The factor does not fall below
    ``min_loss_scale``; an overflow there raises OverflowError.
    """

    def __init__(
        self,
        *,
        initial_scale_power: float = 16,
        loss_scale_window: int = 1000,
        hysteresis: int = 2,
        consecutive_hysteresis: bool = False,
        min_loss_scale: float = 1.0,
    ):
        self._scale = float(2**initial_scale_power)
        self._window = int(loss_scale_window)
        self._hysteresis = int(hysteresis)
        self._consecutive = consecutive_hysteresis
        self._minimum = float(min_loss_scale)
        self._tolerance = self._hysteresis
        self._steps_since_change = 0

    @property
    def scale(self) -> float:
        """The factor."""
        return self._scale

    def update(self, overflow: bool) -> None:
        """Halve, double or wait."""
        if overflow:
            self._after_overflow()
            return
        self._steps_since_change += 1
        if self._consecutive:
            self._tolerance = self._hysteresis
        if self._steps_since_change >= self._window:
            self._scale *= 2
            self._steps_since_change = 0
            self._tolerance = self._hysteresis

    def _after_overflow(self) -> None:
        self._steps_since_change = 0
        if self._tolerance > 1:
            self._tolerance -= 1
            return
        if self._scale <= self._minimum:
            raise OverflowError(
                f"the loss scale is at its minimum of {self._minimum:g} and gradients still overflow in fp16: the "
                "training diverges or the model does not fit fp16's range. Use bf16, a lower learning rate or clipping."
            )
        self._scale = max(self._scale / 2, self._minimum)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"scale": self._scale, "tolerance": self._tolerance, "steps_since_change": self._steps_since_change}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; a static scaler's state gives the factor alone."""
        self._scale = _number(state["scale"])
        self._tolerance = int(_number(state.get("tolerance", self._hysteresis)))
        self._steps_since_change = int(_number(state.get("steps_since_change", 0)))


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)
