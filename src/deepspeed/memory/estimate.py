"""Model-state arithmetic: how many bytes the states of a model take per rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelStateBytes:
    """Bytes of model states on one rank, by kind."""

    parameters: float
    gradients: float
    master: float
    optimizer: float

    @property
    def total(self) -> float:
        """Bytes of all kinds together."""
        return self.parameters + self.gradients + self.master + self.optimizer


def model_state_bytes(
    parameters: int, *, stage: int, world_size: int, dtype_bytes: int, optimizer_states: int = 2
) -> ModelStateBytes:
    """The bytes that ``parameters`` trained elements take on each of ``world_size`` ranks under ZeRO ``stage``.

    Parameters and gradients have ``dtype_bytes`` bytes per element; below 4 bytes there is an fp32 master copy.
    The optimizer keeps ``optimizer_states`` fp32 values per element (2 for Adam, 1 for momentum). Padding and the
    buffers that live only during a step are not counted. Source: Rajbhandari et al., ZeRO (2020), figure 1.
    """
    sharded = 1 / world_size
    return ModelStateBytes(
        parameters=parameters * dtype_bytes * (sharded if stage >= 3 else 1),
        gradients=parameters * dtype_bytes * (sharded if stage >= 2 else 1),
        master=parameters * 4 * (sharded if stage >= 1 else 1) if dtype_bytes < 4 else 0.0,
        optimizer=parameters * 4 * optimizer_states * (sharded if stage >= 1 else 1),
    )
