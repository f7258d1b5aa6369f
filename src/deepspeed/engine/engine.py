"""The training engine: forward, backward, step, save, load.

It owns the accumulation boundary and the order of calls, and hands everything else to its room. A training step is

    loss = engine(batch); engine.backward(loss); engine.step()

once per micro-batch; the parameters change at every ``gradient_accumulation_steps``-th call of ``step``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..config.batch import BatchSizes
from ..profiling.wall_clock import ThroughputTimer, WallClockTimers
from ..zero.optimizer import ShardedOptimizer
from .batches import check_loss, loss_of
from .instruments import Instruments, training_events
from .loader import RepeatingLoader
from .parts import Accumulation, EngineParts
from .states import EngineStates


class DeepSpeedEngine(EngineStates):
    """Wraps a module for training. Attributes that the engine does not have are the module's."""

    def __init__(self, module: nn.Module, parts: EngineParts):
        super().__init__(module, parts)
        self._instruments = Instruments(parts.config, parts.communicator)
        self._compiled = False
        self._destroyed = False
        if parts.config.compile.enabled:
            self.compile(parts.config.compile.backend, parts.config.compile.kwargs)

    # -- the training step -------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, in the configured precision. Inputs and outputs are the module's own."""
        precision = self._parts.precision
        if precision.cast_inputs:
            args, kwargs = precision.cast(args), precision.cast(kwargs)
        training = self.optimizer is not None and torch.is_grad_enabled()
        if training and self.module.training:
            self._refuse_if_destroyed("forward")
        if training:
            self._instruments.begin(self)
        timed = self._instruments.timed("forward") if training else nullcontext()
        with precision.autocast(self.device.type), timed, self.sharded_model.scopes.forward():
            return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True, **kwargs: Any) -> Tensor:
        """Compute gradients of ``loss`` (a scalar), divided by the accumulation steps unless ``scale_wrt_gas`` is
        False, and reduce them over the ranks where the stage does so. Other keywords go to ``Tensor.backward``.

        Returns the loss as it was given. Raises RuntimeError for an engine without an optimizer, ValueError for a loss
        that is not a scalar with a gradient.
        """
        optimizer = self._training_optimizer("backward")
        check_loss(loss)
        if not optimizer.reducer.used:
            # Nothing has accumulated: a step of the optimizer itself, or zero_grad, took what there was.
            self._accumulation.losses.clear()
        scale = optimizer.loss_scale
        if scale_wrt_gas:
            scale /= self.gradient_accumulation_steps()
        optimizer.reducer.begin(reduce=self._reduces(optimizer))
        with self._instruments.timed("backward"), self.sharded_model.backward():
            (loss * scale if scale != 1.0 else loss).backward(retain_graph=retain_graph, **kwargs)
        with self._instruments.timed("reduce"):
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
        self._accumulation.micro_steps += 1
        self._accumulation.backwards = 0
        if boundary:
            with self._instruments.timed("step"):
                optimizer.step()
        self._instruments.end(boundary=boundary)
        if boundary:
            self._after_optimizer_step(optimizer, lr_kwargs or {})

    def _after_optimizer_step(self, optimizer: ShardedOptimizer, lr_kwargs: Mapping[str, Any]) -> None:
        counters = self.counters
        counters.global_steps += 1
        counters.global_samples += self.train_batch_size()
        if optimizer.overflow:
            counters.skipped_steps += 1
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step(**lr_kwargs)
        self._instruments.report(counters.global_steps, self._progress)
        if self._parts.monitor.enabled:
            self._parts.monitor.write_events(training_events(self, self._accumulation.mean_loss()))
        self._accumulation.start_over()

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Train on one batch: ``gradient_accumulation_steps`` micro-batches of ``data_iter`` (the engine's own
        training data where None), then a step. Returns the mean loss of the micro-batches on this rank.

        A batch is given to the module as its arguments (tuple or list), keywords (dict) or only argument; the loss is
        the output itself, its ``loss``, or its first item.
        """
        losses = []
        for _ in range(self.gradient_accumulation_steps()):
            loss = loss_of(self, self._next_batch(data_iter))
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
            losses = [loss_of(self, next(data_iter)) for _ in range(self.gradient_accumulation_steps())]
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

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Backwards inside belong to one micro-step, whose gradients are reduced once, at the end of the context.
        Costs whole gradients meanwhile at a stage that shards them."""
        optimizer = self._training_optimizer("coalesce_grad_reduction")
        with self.no_sync():
            yield
        if self._reduces(optimizer):
            with self._instruments.timed("reduce"):
                optimizer.reducer.begin(reduce=True)
                optimizer.reducer.finish()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say by hand whether this micro-step is the last before an update; from then on the engine does not count."""
        self._accumulation.boundary = is_boundary

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        for parameter in self.module.parameters():
            parameter.grad = None

    def empty_partition_cache(self) -> None:
        """Release the parameters that stage 3 gathered ahead or kept; the other stages gather none."""
        self.sharded_model.scopes.fetcher.release_idle()

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times the loss scale, for those who call ``backward`` on it themselves."""
        return loss * self._training_optimizer("scale").loss_scale

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Train on ``train_batch_size`` samples per optimizer step from now on, by accumulating over more or fewer
        micro-steps. Call it between optimizer steps. Raises ValueError for what is no multiple of one micro-step."""
        samples = self._batch.micro * self.communicator.size
        if train_batch_size < samples or train_batch_size % samples:
            raise ValueError(
                f"train_batch_size {train_batch_size} is not a multiple of {samples}: {self._batch.micro} samples per "
                f"micro-step on each of {self.communicator.size} ranks"
            )
        self._set_batch(BatchSizes(train_batch_size, self._batch.micro, train_batch_size // samples))

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Say that a micro-step has ``micro_batch_size`` samples on each rank from now on; the number of micro-steps
        stays, and so does the engine's own data loader."""
        if micro_batch_size < 1:
            raise ValueError(f"the micro-batch size must be at least 1 sample, got {micro_batch_size}")
        steps = self._batch.accumulation
        self._set_batch(BatchSizes(micro_batch_size * steps * self.communicator.size, micro_batch_size, steps))

    def _set_batch(self, sizes: BatchSizes) -> None:
        if self._accumulation.micro_steps:
            raise RuntimeError(
                f"batch sizes change between optimizer steps; {self._accumulation.micro_steps} micro-steps of this one "
                "have passed"
            )
        self._batch = sizes
        self._instruments.throughput.batch_size = sizes.train
        if self.optimizer is not None:
            self.optimizer.reducer.accumulate_in(self._parts.precision.kept_dtype(sizes.accumulation))

    # -- compiling, ending -----------------------------------------------------------------------------------------------

    def compile(self, backend: str | Callable[..., Any] = "inductor", compile_kwargs: Any = None) -> None:
        """Compile the module in place with ``torch.compile``."""
        self.module.compile(backend=backend, **(compile_kwargs or {}))
        self._compiled = True

    @property
    def is_compiled(self) -> bool:
        """Whether ``compile`` has been called; torch compiles at the forward that follows."""
        return self._compiled

    def destroy(self) -> None:
        """Take the engine's hooks off the module and free gradients and optimizer states. The module keeps its
        parameters, at stage 3 in shards as ``zero.Init`` leaves them: they are whole inside ``zero.GatheredParameters``, and
        the module may be given to ``initialize`` again. This engine trains no more. Called on all ranks."""
        if self._destroyed:
            return
        self._destroyed = True
        self._saves.wait()
        self.reload_states()
        if self.optimizer is not None:
            self.optimizer.close()
        self.sharded_model.close()
        self._instruments.close()
        self._parts.monitor.close()
        self._batches = None
        self._accumulation = Accumulation()

    # -- measuring ---------------------------------------------------------------------------------------------------

    @property
    def tput_timer(self) -> ThroughputTimer:
        """Samples per second, forward to step."""
        return self._instruments.throughput

    @property
    def timers(self) -> WallClockTimers:
        """The times of ``wall_clock_breakdown``: forward, backward, reduce and step."""
        return self._instruments.timers

    def _progress(self) -> str:
        return (
            f"step={self.global_steps}, skipped={self.skipped_steps}, lr={self.get_lr()}, "
            f"loss={self._accumulation.mean_loss():.4f}, grad_norm={self.get_global_grad_norm():.4f}"
        )

    # -- small helpers -----------------------------------------------------------------------------------------------

    def _reduces(self, optimizer: ShardedOptimizer) -> bool:
        """Whether this micro-step's backward ends with reduced gradients."""
        sharded = optimizer.policy.shard_gradients
        return self._accumulation.synchronize and (sharded or self.is_gradient_accumulation_boundary())

    def _refuse_if_destroyed(self, call: str) -> None:
        if self._destroyed:
            raise RuntimeError(
                f"engine.{call}(): this engine was destroyed and trains no more; give its module to deepspeed.initialize "
                "again. A Trainer of Hugging Face does so in its second train() after trainer.model_wrapped = trainer.model"
            )

    def _training_optimizer(self, call: str) -> ShardedOptimizer:
        self._refuse_if_destroyed(call)
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
            self._batches = RepeatingLoader(self.training_dataloader)
        return next(self._batches)
