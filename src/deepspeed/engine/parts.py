"""What an engine is made of, and where its training stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..comm.communicator import Communicator
from ..config import DeepSpeedConfig
from ..monitor.monitor import MonitorMaster
from ..zero.optimizer import ShardedOptimizer
from ..zero.sharding import ShardedModel
from .precision import PrecisionPolicy


@dataclass
class EngineParts:
    """What :func:`deepspeed.initialize` puts together and the engine drives."""

    config: DeepSpeedConfig
    communicator: Communicator
    precision: PrecisionPolicy
    model: ShardedModel
    optimizer: ShardedOptimizer | None
    lr_scheduler: Any
    dataloader: Any
    device: torch.device
    monitor: MonitorMaster


@dataclass
class Counters:
    """Where training stands. A micro-step is one forward and backward; a global step is one optimizer step, also a
    skipped one."""

    micro_steps: int = 0
    global_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0


@dataclass
class Accumulation:
    """Where the engine is between two optimizer steps. ``boundary`` None means that the engine counts micro-steps
    itself; ``losses`` are those of the backwards since the last optimizer step."""

    boundary: bool | None = None
    synchronize: bool = True
    micro_steps: int = 0
    backwards: int = 0
    losses: list[Tensor] = field(default_factory=list)

    def mean_loss(self) -> float:
        """The mean of the losses so far, on this rank."""
        return torch.stack(self.losses).float().mean().item()

    def start_over(self) -> None:
        """An optimizer step is complete."""
        self.micro_steps = 0
        self.losses.clear()
