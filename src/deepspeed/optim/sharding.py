"""How an optimizer steps over flat slices in place of whole parameters.

A :class:`Stepper` applies one optimizer step to all slices of a rank. There are three kinds, chosen by
:func:`make_stepper` from what the optimizer can do:

- an optimizer with ``step_shard`` updates a slice in one pass over memory, gradient factor and 16-bit output included;
- torch's elementwise optimizers step slice by slice: an update of one element depends on no other, so a slice is as
  good as a parameter;
- any other optimizer takes one step over all slices at once. One that needs whole parameters (norms, matrices) says so
  by a method ``bind(shards, communicator)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..comm.communicator import Communicator
from ..memory.layout import Bucket, Fragment

ELEMENTWISE: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)
"""torch's optimizers whose update of an element depends on that element alone."""

UNSUITED: dict[str, str] = {
    "LBFGS": "it re-evaluates the loss through a closure",
    "SparseAdam": "it takes sparse gradients only",
    "Adafactor": "it factors whole matrices, and a slice is none",
    "Muon": "it steps whole matrices; name the optimizer 'Muon' in the configuration, which gathers them",
}
"""torch's optimizers (those that this torch has) that cannot step on flat slices, and why."""


@dataclass(frozen=True)
class FlatShard:
    """``tensor`` (1-D, fp32) is ``shard``'s slice of ``bucket``, as the inner optimizer's parameter groups hold it."""

    tensor: Tensor
    bucket: Bucket
    shard: int

    @cached_property
    def fragments(self) -> tuple[Fragment, ...]:
        """The parts of parameters of which the slice is made."""
        return self.bucket.fragments(self.shard)


@dataclass(frozen=True)
class ShardUpdate:
    """One slice's part in a step.

    ``gradient`` (1-D, any floating dtype) is the mean over ranks; it is consumed: a step may scale it in place.
    ``out`` is the 16-bit slice of the model's parameters that receives the updated values, None where ``shard.tensor``
    is the parameter memory itself. The elements in ``untouched`` belong to parameters that got no gradient on any
    rank: they and their states stay as they are, as in a plain optimizer that finds ``grad`` None.
    """

    shard: FlatShard
    gradient: Tensor
    out: Tensor | None
    untouched: tuple[slice, ...] = ()


class Stepper(Protocol):
    """Applies optimizer steps to a rank's slices."""

    def step(
        self, updates: Sequence[ShardUpdate], *, gradient_scale: float, finished: Callable[[FlatShard], None]
    ) -> None:
        """One step with each gradient times ``gradient_scale``. ``finished`` is called for each slice as soon as its
        parameters are final."""


@runtime_checkable
class ShardStepping(Protocol):
    """An optimizer that updates one slice in one pass."""

    def step_shard(self, shard: Tensor, gradient: Tensor, *, gradient_scale: float, out: Tensor | None) -> None:
        """Update ``shard``, an element of the optimizer's parameter groups, and write it to ``out`` where given."""


@runtime_checkable
class WholeParameterStepping(Protocol):
    """An optimizer that needs to know which parameters its slices are parts of."""

    def bind(self, shards: Sequence[FlatShard], communicator: Communicator) -> None:
        """Learn the slices in the parameter groups, and the ranks that hold the rest."""


def make_stepper(
    optimizer: torch.optim.Optimizer, shards: Sequence[FlatShard], communicator: Communicator
) -> Stepper:
    """The stepper for an optimizer whose parameter groups hold the tensors of ``shards``.

    Raises ValueError for an optimizer that cannot step on slices.
    """
    refuse_unsuited(optimizer)
    _adopt_states(optimizer, shards)
    if isinstance(optimizer, ShardStepping):
        return _OnePass(optimizer, optimizer)
    if type(optimizer) in ELEMENTWISE:
        return _SliceBySlice(optimizer)
    if isinstance(optimizer, WholeParameterStepping):
        optimizer.bind(shards, communicator)
    return _AllAtOnce(optimizer)


def refuse_unsuited(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for an optimizer that cannot step on slices, saying why."""
    for name, reason in UNSUITED.items():
        if isinstance(optimizer, getattr(torch.optim, name, ())):
            raise ValueError(f"torch.optim.{name} cannot be sharded: {reason}. Or use AdamW, which is elementwise.")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"{type(optimizer).__name__} cannot be sharded: its step() needs a closure, and gradients are already reduced "
            "when a step begins. Use an optimizer whose closure is optional."
        )


def has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``optimizer`` has state that a step left. Adagrad makes its states at construction: those do not count."""
    return any(float(state.get("step", 1)) > 0 for state in optimizer.state.values() if state)


def _adopt_states(optimizer: torch.optim.Optimizer, shards: Sequence[FlatShard]) -> None:
    """Drop states of parameters that the slices replace, and give the slices those that Adagrad expects to find."""
    held = {id(shard.tensor) for shard in shards}
    for parameter in [p for p in optimizer.state if id(p) not in held]:
        del optimizer.state[parameter]
    if isinstance(optimizer, torch.optim.Adagrad):
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if not optimizer.state[tensor]:
                    initial = torch.full_like(tensor, group["initial_accumulator_value"])
                    optimizer.state[tensor] = {"step": torch.tensor(0.0), "sum": initial}


class _OnePass:
    def __init__(self, optimizer: torch.optim.Optimizer, stepping: ShardStepping):
        self._optimizer = optimizer
        self._stepping = stepping

    def step(
        self, updates: Sequence[ShardUpdate], *, gradient_scale: float, finished: Callable[[FlatShard], None]
    ) -> None:
        for update in updates:
            with _untouched(self._optimizer, update):
                self._stepping.step_shard(
                    update.shard.tensor, update.gradient, gradient_scale=gradient_scale, out=update.out
                )
            finished(update.shard)
        # torch's schedulers look for this mark of a step() that came before theirs.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]


class _SliceBySlice:
    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer

    def step(
        self, updates: Sequence[ShardUpdate], *, gradient_scale: float, finished: Callable[[FlatShard], None]
    ) -> None:
        for update in updates:
            _step_on(self._optimizer, [update], gradient_scale)
            finished(update.shard)


class _AllAtOnce:
    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer

    def step(
        self, updates: Sequence[ShardUpdate], *, gradient_scale: float, finished: Callable[[FlatShard], None]
    ) -> None:
        _step_on(self._optimizer, updates, gradient_scale)
        for update in updates:
            finished(update.shard)


def _step_on(optimizer: torch.optim.Optimizer, updates: Sequence[ShardUpdate], gradient_scale: float) -> None:
    """One plain step of ``optimizer`` on the slices of ``updates``; the others have no gradient and are left alone."""
    for update in updates:
        gradient = update.gradient.to(update.shard.tensor.dtype)
        update.shard.tensor.grad = gradient.mul_(gradient_scale) if gradient_scale != 1.0 else gradient
    try:
        with _untouched(optimizer, *updates):
            optimizer.step()
    finally:
        for update in updates:
            update.shard.tensor.grad = None
    for update in updates:
        if update.out is not None:
            update.out.copy_(update.shard.tensor)


@contextmanager
def _untouched(optimizer: torch.optim.Optimizer, *updates: ShardUpdate) -> Iterator[None]:
    """Put parameters and states back as they were at each update's ``untouched`` elements.

    States that a step creates there are zeroed: they are as a first step later will find them.
    """
    saved = []
    for update in updates:
        for where in update.untouched:
            tensors = [(None, update.shard.tensor), *_elementwise_states(optimizer, update.shard.tensor).items()]
            saved.append((update, where, {key: tensor[where].clone() for key, tensor in tensors}))
    yield
    for update, where, values in saved:
        shard = update.shard.tensor
        shard[where] = values[None]
        for key, tensor in _elementwise_states(optimizer, shard).items():
            tensor[where] = values.get(key, torch.zeros((), dtype=tensor.dtype))
        if update.out is not None:
            update.out[where] = shard[where].to(update.out.dtype)


def _elementwise_states(optimizer: torch.optim.Optimizer, shard: Tensor) -> dict[str | None, Tensor]:
    state = optimizer.state.get(shard, {})
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.shape == shard.shape}
