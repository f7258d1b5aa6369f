"""The training engine: forward, backward, step, save, load.

It owns the accumulation boundary and the order of calls, and hands everything else to its room. A training step is

    loss = engine(batch); engine.backward(loss); engine.step()

once per micro-batch; the parameters change at every ``gradient_accumulation_steps``-th call of ``step``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..comm.communicator import Communicator
from ..config import DeepSpeedConfig
from ..memory.estimate import ModelStateBytes
from ..monitor.monitor import MonitorMaster
from ..zero.optimizer import ShardedOptimizer
from .accounting import measure_model_states
from .checkpointing import load_training_checkpoint, save_training_checkpoint
from .precision import PrecisionPolicy

logger = logging.getLogger("DeepSpeed")


@dataclass
class EngineParts:
    """What :func:`deepspeed.initialize` puts together and the engine drives."""

    config: DeepSpeedConfig
    communicator: Communicator
    precision: PrecisionPolicy
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
class _Accumulation:
    """Where the engine is between two optimizer steps."""

    boundary: bool | None = None
    synchronize: bool = True
    backwards: int = 0
    losses: list[Tensor] = field(default_factory=list)


class DeepSpeedEngine(nn.Module):
    """Wraps a module for training. Attributes that the engine does not have are the module's."""

    def __init__(self, module: nn.Module, parts: EngineParts):
        super().__init__()
        self.module = module
        self.optimizer = parts.optimizer
        self.lr_scheduler = parts.lr_scheduler
        self.training_dataloader = parts.dataloader
        self.device = parts.device
        self.counters = Counters()
        self.settings = parts.config
        self._parts = parts
        self._accumulation = _Accumulation()
        self._batches: Iterator[Any] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    # -- the training step -------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, in the configured precision. Inputs and outputs are the module's own."""
        precision = self._parts.precision
        if precision.cast_inputs:
            args, kwargs = precision.cast(args), precision.cast(kwargs)
        with precision.autocast(self.device.type):
            return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True, **kwargs: Any) -> Tensor:
        """Compute gradients of ``loss`` (a scalar), divided by the accumulation steps unless ``scale_wrt_gas`` is
        False, and reduce them over the ranks where the stage does so. Other keywords go to ``Tensor.backward``.

        Returns the loss as it was given. Raises RuntimeError for an engine without an optimizer, ValueError for a loss
        that is not a scalar with a gradient.
        """
        optimizer = self._training_optimizer("backward")
        _check_loss(loss)
        scale = optimizer.loss_scale
        if scale_wrt_gas:
            scale /= self.gradient_accumulation_steps()
        sharded = optimizer.policy.shard_gradients
        reduce = self._accumulation.synchronize and (sharded or self.is_gradient_accumulation_boundary())
        optimizer.reducer.begin(reduce=reduce)
        (loss * scale if scale != 1.0 else loss).backward(retain_graph=retain_graph, **kwargs)
        optimizer.reducer.finish()
        self._accumulation.backwards += 1
        self._accumulation.losses.append(loss.detach())
        return loss

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """End a micro-step; at the accumulation boundary update the parameters and the learning rate.

        Raises RuntimeError where no backward has run since the last step, and inside ``no_sync``.
        """
        optimizer = self._training_optimizer("step")
        if not self._accumulation.backwards and not optimizer.reducer.used:
            raise RuntimeError("engine.step() was called before engine.backward(loss): there are no gradients")
        if not self._accumulation.synchronize:
            raise RuntimeError("engine.step() was called inside no_sync(): leave the context before the last backward")
        boundary = self.is_gradient_accumulation_boundary()
        self.counters.micro_steps += 1
        self._accumulation.backwards = 0
        if boundary:
            self._optimizer_step(optimizer, lr_kwargs or {})

    def _optimizer_step(self, optimizer: ShardedOptimizer, lr_kwargs: Mapping[str, Any]) -> None:
        optimizer.step()
        counters = self.counters
        counters.global_steps += 1
        counters.global_samples += self.train_batch_size()
        if optimizer.overflow:
            counters.skipped_steps += 1
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step(**lr_kwargs)
        every = self.steps_per_print()
        if every and counters.global_steps % every == 0 and self.communicator.rank == 0:
            logger.info(
                "step=%d, skipped=%d, lr=%s, loss=%.4f, grad_norm=%.4f",
                counters.global_steps,
                counters.skipped_steps,
                self.get_lr(),
                torch.stack(self._accumulation.losses).float().mean().item(),
                self.get_global_grad_norm(),
            )
        if self._parts.monitor.enabled:
            self._write_events(optimizer)
        self._accumulation.losses.clear()

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Train on one batch: ``gradient_accumulation_steps`` micro-batches of ``data_iter`` (the engine's own
        training data where None), then a step. Returns the mean loss of the micro-batches on this rank.

        A batch is given to the module as its arguments (tuple or list), keywords (dict) or only argument; the loss is
        the output itself, its ``loss``, or its first item.
        """
        losses = []
        for _ in range(self.gradient_accumulation_steps()):
            loss = self._loss_of(self._next_batch(data_iter))
            self.backward(loss)
            losses.append(loss.detach())
            self.step()
        return torch.stack(losses).mean()

    @torch.no_grad()
    def eval_batch(self, data_iter: Iterator[Any]) -> Tensor:
        """The mean loss over ``gradient_accumulation_steps`` micro-batches, in evaluation mode and without
        gradients."""
        training = self.module.training
        self.module.eval()
        try:
            losses = [self._loss_of(next(data_iter)) for _ in range(self.gradient_accumulation_steps())]
        finally:
            self.module.train(training)
        return torch.stack(losses).mean()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside accumulate on this rank alone; the next one outside reduces all. Works at every stage; a
        stage that shards gradients holds whole ones meanwhile."""
        before = self._accumulation.synchronize
        self._accumulation.synchronize = False
        try:
            yield
        finally:
            self._accumulation.synchronize = before

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether this micro-step is the last before an update."""
        if self._accumulation.boundary is not None:
            return self._accumulation.boundary
        return (self.counters.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say by hand whether this micro-step is the last before an update; from then on the engine does not count."""
        self._accumulation.boundary = is_boundary

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        for parameter in self.module.parameters():
            parameter.grad = None

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times the loss scale, for those who call ``backward`` on it themselves."""
        return loss * self._training_optimizer("scale").loss_scale

    # -- numbers -----------------------------------------------------------------------------------------------------

    def get_global_grad_norm(self) -> float | None:
        """The norm of the last step's gradient over all parameters and ranks, before clipping; None before a step."""
        outcome = self.optimizer.outcome if self.optimizer is not None else None
        return outcome.norm if outcome is not None else None

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups] if self.optimizer is not None else []

    def model_state_bytes(self) -> ModelStateBytes:
        """Bytes of this rank's model states, measured from the storages that live now."""
        return measure_model_states(self.module, self.optimizer)

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

    @property
    def communicator(self) -> Communicator:
        """The data-parallel ranks, with the log of what they exchanged."""
        return self._parts.communicator

    @property
    def data_parallel_group(self) -> Any:
        """The process group of the data-parallel ranks."""
        return self._parts.communicator.group or torch.distributed.group.WORLD

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as it was given."""
        return self.settings.raw

    def train_batch_size(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.settings.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one micro-step on one rank."""
        return self.settings.train_micro_batch_size_per_gpu

    def gradient_accumulation_steps(self) -> int:
        """Micro-steps of one optimizer step."""
        return self.settings.gradient_accumulation_steps

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage."""
        return self.settings.zero_optimization.stage

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
        """Optimizer steps between two lines in the log."""
        return self.settings.steps_per_print

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Whether ``save_16bit_model`` gathers sharded weights."""
        return self.settings.zero_optimization.stage3_gather_16bit_weights_on_model_save

    # -- saving, loading, ending -------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
    ) -> bool:
        """Save all states under ``save_dir/tag`` (``global_step<N>`` where None). Called on every rank.

        The checkpoint appears whole or not at all; ``latest`` names it afterwards where ``save_latest``.
        ``client_state`` (JSON-like values and tensors) comes back from ``load_checkpoint``. Returns True.
        """
        save_training_checkpoint(
            self,
            Path(save_dir),
            tag=str(tag) if tag is not None else f"global_step{self.global_steps}",
            client_state=dict(client_state or {}),
            save_latest=save_latest,
        )
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load the checkpoint ``tag`` (the one that ``latest`` names where None), saved at any world size and stage.

        Returns its path and the client state, or ``(None, None)`` where ``load_dir`` has no checkpoint. A damaged
        one raises, and leaves the engine as it was.
        """
        return load_training_checkpoint(
            self,
            Path(load_dir),
            tag=str(tag) if tag is not None else None,
            strict=load_module_strict,
            optimizer_states=load_optimizer_states and not load_module_only,
            scheduler_states=load_lr_scheduler_states and not load_module_only,
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The module's ``load_state_dict``; the fp32 masters follow."""
        result = self.module.load_state_dict(state_dict, *args, **kwargs)
        if self.optimizer is not None:
            self.optimizer.flat.masters_from_parameters()
        return result

    def compile(self, backend: str | Callable[..., Any] = "inductor", compile_kwargs: Any = None) -> None:
        """Compile the module in place with ``torch.compile``."""
        self.module.compile(backend=backend, **(compile_kwargs or {}))

    def destroy(self) -> None:
        """Take the engine's hooks off the module and free gradients and optimizer states. The module keeps its
        parameters and may be given to ``initialize`` again."""
        if self.optimizer is not None:
            self.optimizer.close()
        self._parts.monitor.close()
        self._batches = None
        self._accumulation = _Accumulation()

    # -- small helpers -----------------------------------------------------------------------------------------------

    def _write_events(self, optimizer: ShardedOptimizer) -> None:
        samples = self.counters.global_samples
        loss = torch.stack(self._accumulation.losses).float().mean().item()
        events = [("Train/Samples/train_loss", loss, samples), ("Train/Samples/lr", self.get_lr()[0], samples)]
        if self.fp16_enabled():
            events.append(("Train/Samples/loss_scale", optimizer.loss_scale, samples))
        self._parts.monitor.write_events(events)

    def _training_optimizer(self, call: str) -> ShardedOptimizer:
        if self.optimizer is None:
            raise RuntimeError(
                f"engine.{call}() needs an optimizer: give deepspeed.initialize an optimizer, or the configuration an "
                "'optimizer' section"
            )
        return self.optimizer

    def _next_batch(self, data_iter: Iterator[Any] | None) -> Any:
        if data_iter is not None:
            return next(data_iter)
        if self._batches is None:
            if self.training_dataloader is None:
                raise ValueError("train_batch() needs a data_iter, or training_data given to deepspeed.initialize")
            self._batches = iter(self.training_dataloader)
        return next(self._batches)

    def _loss_of(self, batch: Any) -> Tensor:
        if isinstance(batch, Mapping):
            output = self(**batch)
        elif isinstance(batch, (list, tuple)):
            output = self(*batch)
        else:
            output = self(batch)
        if isinstance(output, Tensor):
            return output
        loss: Tensor = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", None) or output[0]
        return loss


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise ValueError(f"engine.backward(loss) needs a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"engine.backward(loss) needs a scalar, got shape {tuple(loss.shape)}: reduce it, as by .mean()")
    if not loss.requires_grad:
        raise ValueError(
            "engine.backward(loss): the loss has no gradient; it does not depend on a trainable parameter, or was "
            "computed under torch.no_grad()"
        )
