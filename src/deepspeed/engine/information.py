"""What an engine can be asked: sizes, settings, counters, learning rates, norms. Nothing here changes training."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from ..checkpoint.background import BackgroundSaves
from ..comm.communicator import Communicator
from ..config.batch import BatchSizes
from ..memory.estimate import ModelStateBytes
from ..zero.sharding import ShardedModel
from .accounting import measure_model_states
from .loader import RepeatingLoader
from .parts import Accumulation, Counters, EngineParts


class EngineInformation(nn.Module):
    """A module with the parts that train it. Attributes that are not found here are the module's."""

    def __init__(self, module: nn.Module, parts: EngineParts):
        super().__init__()
        self.module = module
        self.optimizer = parts.optimizer
        self.lr_scheduler = parts.lr_scheduler
        self.training_dataloader = parts.dataloader
        self.device = parts.device
        self.settings = parts.config
        self.counters = Counters()
        self._parts = parts
        self._accumulation = Accumulation()
        self._batches: RepeatingLoader | None = None
        self._saves = BackgroundSaves()
        config = parts.config
        self._batch = BatchSizes(
            config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    @property
    def sharded_model(self) -> ShardedModel:
        """The module's parameters as they are laid out and sharded."""
        return self._parts.model

    # -- ranks ---------------------------------------------------------------------------------------------------------

    @property
    def communicator(self) -> Communicator:
        """The data-parallel ranks, with the log of what they exchanged."""
        return self._parts.communicator

    @property
    def data_parallel_group(self) -> Any:
        """The process group of the data-parallel ranks."""
        return self.communicator.group or dist.group.WORLD

    @property
    def global_rank(self) -> int:
        """This process's rank among all."""
        return dist.get_rank()

    @property
    def local_rank(self) -> int:
        """This process's rank on its machine, 0 where no launcher has said."""
        return dist.get_node_local_rank(fallback_rank=0)

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return dist.get_world_size()

    # -- where training stands -----------------------------------------------------------------------------------------

    @property
    def global_steps(self) -> int:
        """Optimizer steps so far, skipped ones included."""
        return self.counters.global_steps

    @property
    def micro_steps(self) -> int:
        """Forward-backward passes so far."""
        return self.counters.micro_steps

    @property
    def global_samples(self) -> int:
        """Samples that all ranks together have trained on."""
        return self.counters.global_samples

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were skipped because of a non-finite gradient."""
        return self.counters.skipped_steps

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether this micro-step is the last before an update."""
        if self._accumulation.boundary is not None:
            return self._accumulation.boundary
        return self._accumulation.micro_steps + 1 >= self.gradient_accumulation_steps()

    def get_global_grad_norm(self) -> float | None:
        """The norm of the last step's gradient over all parameters and ranks, before clipping; None before a step."""
        outcome = self.optimizer.outcome if self.optimizer is not None else None
        return outcome.norm if outcome is not None else None

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [float(group["lr"]) for group in self._groups()]

    def get_mom(self) -> list[Any]:
        """The momentum of each parameter group: its ``momentum`` or ``betas``, None where it has neither."""
        return [group.get("momentum", group.get("betas")) for group in self._groups()]

    def get_type(self) -> list[str | None]:
        """The kind of optimizer of each parameter group: its own ``type`` where it has one, else the optimizer's."""
        return [group.get("type", self.optimizer_name()) for group in self._groups()]

    def loss_scale(self) -> float:
        """The factor by which losses are multiplied before backward; 1 outside fp16."""
        return self.optimizer.loss_scale if self.optimizer is not None else 1.0

    def model_state_bytes(self) -> ModelStateBytes:
        """Bytes of this rank's model states, measured from the storages that live now."""
        return measure_model_states(self.module, self.sharded_model, self.optimizer)

    # -- settings ------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as it was given."""
        return self.settings.raw

    def train_batch_size(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self._batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one micro-step on one rank."""
        return self._batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-steps of one optimizer step."""
        return self._batch.accumulation

    def get_batch_info(self) -> tuple[int, int, int]:
        """``(train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps)``."""
        return self._batch.train, self._batch.micro, self._batch.accumulation

    def optimizer_name(self) -> str | None:
        """The configuration's name of the optimizer, the class of one that was given, None without an optimizer."""
        if self.optimizer is None:
            return None
        if self.settings.optimizer is not None:
            return self.settings.optimizer.type
        return type(self.optimizer.optimizer).__name__

    def scheduler_name(self) -> str | None:
        """The configuration's name of the learning-rate schedule, None where it has none."""
        return self.settings.scheduler.type if self.settings.scheduler is not None else None

    def zero_optimization(self) -> bool:
        """Whether any model state is sharded."""
        return self.zero_optimization_stage() > 0

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage."""
        return self.settings.zero_optimization.stage

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Whether ``save_16bit_model`` gathers sharded weights at stage 3; at the other stages they are whole."""
        return self.settings.zero_optimization.stage3_gather_16bit_weights_on_model_save

    def fp16_enabled(self) -> bool:
        """Whether the model is trained in fp16."""
        return self.settings.fp16.enabled

    def bfloat16_enabled(self) -> bool:
        """Whether the model is trained in bf16."""
        return self.settings.bf16.enabled

    def gradient_clipping(self) -> float:
        """The norm to which gradients are clipped, 0 for none."""
        return self.settings.gradient_clipping

    def steps_per_print(self) -> float | None:
        """Optimizer steps between two lines in the log; None or infinity for none."""
        return self.settings.steps_per_print

    def wall_clock_breakdown(self) -> bool:
        """Whether the times of forward, backward, reduction and step are logged."""
        return self.settings.wall_clock_breakdown

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups if self.optimizer is not None else []
