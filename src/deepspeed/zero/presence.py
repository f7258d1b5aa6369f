"""Which states of an engine are where they are needed, and which were taken off the device for a while."""

from __future__ import annotations

from enum import Enum


class OffloadStateTypeEnum(str, Enum):
    """The states that ``engine.offload_states`` takes away.

    ``optim_states``: what the optimizer keeps of each element. ``hp_params``: the parameters as the optimizer steps them.
    ``lp_params``: the parameters in the model's dtype. ``lp_grads``: the gradients that are kept for the step.
    ``contiguous_grad_buffer``: gradients that wait for their reduction.
    """

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


class OffloadDeviceEnum(str, Enum):
    """Places of states."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


GRADIENTS = (OffloadStateTypeEnum.lp_grads, OffloadStateTypeEnum.contiguous_grad_buffer)
"""What a backward adds to."""


class Presence:
    """Knows which states are ``away``."""

    def __init__(self) -> None:
        self.away: frozenset[OffloadStateTypeEnum] = frozenset()

    def require(self, what: str, *states: OffloadStateTypeEnum) -> None:
        """Raise RuntimeError where one of ``states`` (of all, where none is named), which ``what`` needs, is away."""
        missing = sorted(state.value for state in self.away & frozenset(states or OffloadStateTypeEnum))
        if missing:
            raise RuntimeError(
                f"{what} needs {', '.join(missing)}, which engine.offload_states() has taken away: call "
                "engine.reload_states() before"
            )
