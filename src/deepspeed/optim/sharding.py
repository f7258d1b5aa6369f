"""How an optimizer steps over flat slices in place of whole parameters.

A :class:`Stepper` applies one optimizer step to all slices of a rank. There are three kinds, chosen by
:func:`make_stepper` from what the optimizer can do:

- an optimizer with ``step_shard`` updates a slice in one pass over memory, gradient factor and 16-bit output included;
- torch's elementwise optimizers step slice by slice: an update of one element depends on no other, so a slice is as
  good as a parameter;
- any other optimizer takes one step over all slices at once. One that needs whole parameters (norms, matrices) says so
  by a method ``bind(segments, communicator)``.

Each steps the slices by their :mod:`.segments`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..comm.communicator import Communicator
from .segments import FlatShard, Segments

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
class ShardUpdate:
    """One slice's part in a step.

    ``gradient`` (1-D, any floating dtype) is the mean over ranks; it is consumed: a step may scale it in place.
    ``out`` is the 16-bit slice of the model's parameters that receives the updated values, None where ``shard.tensor``
    is the parameter memory itself. The parameters named ``unused`` got no gradient on any rank: they, their states and
    their step numbers stay as they are, as in a plain optimizer that finds ``grad`` None.
    """

    shard: FlatShard
    gradient: Tensor
    out: Tensor | None
    unused: Collection[str] = ()


class Stepper(Protocol):
    """Applies optimizer steps to a rank's slices."""

    def step(
        self, updates: Iterable[ShardUpdate], *, gradient_scale: float, finished: Callable[[FlatShard], None]
    ) -> None:
        """One step with each gradient times ``gradient_scale``. ``finished`` is called for each slice as soon as its
        parameters are final. A stepper that goes slice by slice is done with one when it asks for the next."""


@runtime_checkable
class ShardStepping(Protocol):
    """An optimizer that updates a slice, or a segment of one, in one pass."""

    def step_shard(self, shard: Tensor, gradient: Tensor, *, gradient_scale: float, out: Tensor | None) -> None:
        """Update ``shard``, an element of the optimizer's parameter groups, and write it to ``out`` where given."""


@runtime_checkable
class WholeParameterStepping(Protocol):
    """An optimizer that needs to know which parameters its slices are parts of."""

    def bind(self, segments: Segments, communicator: Communicator) -> None:
        """Learn the segments in the parameter groups, which may be cut further later, and the ranks that hold the
        rest."""


def make_stepper(segments: Segments, communicator: Communicator) -> Stepper:
    """The stepper for the optimizer of ``segments``. Raises ValueError for one that cannot step on slices."""
    optimizer = segments.optimizer
    refuse_unsuited(optimizer)
    if isinstance(optimizer, ShardStepping):
        return _OnePass(segments, optimizer)
    if type(optimizer) in ELEMENTWISE:
        return _SliceBySlice(segments)
    if isinstance(optimizer, WholeParameterStepping):
        optimizer.bind(segments, communicator)
    return _AllAtOnce(segments)


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


def refuse_all_at_once(optimizer: torch.optim.Optimizer, remedy: str) -> None:
    """Raise ValueError for an optimizer that cannot step slice by slice, but needs all states at once; ``remedy`` says what
    is not possible so, and what to set instead."""
    if not isinstance(optimizer, ShardStepping) and type(optimizer) not in ELEMENTWISE:
        raise ValueError(
            f"{type(optimizer).__name__} needs all its states at once, so they {remedy}, or use an elementwise optimizer such "
            "as AdamW"
        )


def has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``optimizer`` has state that a step left. Adagrad makes its states at construction: those do not count."""
    return any(float(state.get("step", 1)) > 0 for state in optimizer.state.values() if state)


@dataclass(frozen=True)
class _Part:
    """A :class:`ShardUpdate`, narrowed to a segment that steps."""

    tensor: Tensor
    gradient: Tensor
    out: Tensor | None


def _parts(segments: Segments, update: ShardUpdate) -> list[_Part]:
    """The segments of a slice that step: those of parameters with a gradient, after a cut where that makes a difference."""
    if update.unused:
        segments.separate(update.shard, update.unused)
    return [
        _Part(segment.tensor, update.gradient[segment.where], None if update.out is None else update.out[segment.where])
        for segment in segments.of(update.shard)
        if not segment.idle(update.unused)
    ]


class _OnePass:
    def __init__(self, segments: Segments, stepping: ShardStepping):
        self._segments = segments
        self._stepping = stepping

    def step(
        self, updates: Iterable[ShardUpdate], *, gradient_scale: float, finished: Callable[[FlatShard], None]
    ) -> None:
        for update in updates:
            for part in _parts(self._segments, update):
                self._stepping.step_shard(part.tensor, part.gradient, gradient_scale=gradient_scale, out=part.out)
            finished(update.shard)
        # torch's schedulers look for this mark of a step() that came before theirs.
        self._segments.optimizer._opt_called = True  # type: ignore[attr-defined]


class _SliceBySlice:
    def __init__(self, segments: Segments):
        self._segments = segments

    def step(
        self, updates: Iterable[ShardUpdate], *, gradient_scale: float, finished: Callable[[FlatShard], None]
    ) -> None:
        for update in updates:
            _step_on(self._segments.optimizer, _parts(self._segments, update), gradient_scale)
            finished(update.shard)


class _AllAtOnce:
    def __init__(self, segments: Segments):
        self._segments = segments

    def step(
        self, updates: Iterable[ShardUpdate], *, gradient_scale: float, finished: Callable[[FlatShard], None]
    ) -> None:
        updates = list(updates)
        parts = [part for update in updates for part in _parts(self._segments, update)]
        _step_on(self._segments.optimizer, parts, gradient_scale)
        for update in updates:
            finished(update.shard)


def _step_on(optimizer: torch.optim.Optimizer, parts: Sequence[_Part], gradient_scale: float) -> None:
    """One plain step of ``optimizer`` on ``parts``; its other segments have no gradient and are left alone."""
    for part in parts:
        gradient = part.gradient.to(part.tensor.dtype)
        part.tensor.grad = gradient.mul_(gradient_scale) if gradient_scale != 1.0 else gradient
    try:
        optimizer.step()
    finally:
        for part in parts:
            part.tensor.grad = None
    for part in parts:
        if part.out is not None:
            part.out.copy_(part.tensor)
