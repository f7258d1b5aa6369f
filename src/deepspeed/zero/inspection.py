"""Reading and changing the fp32 values behind a parameter of a training engine, whatever its stage has sharded.

For each trainable parameter there are an fp32 value (the master, where the model is 16-bit), a gradient and the
optimizer's states. *Full* functions give or take them in the parameter's shape; *local* ones give or take the part that
this rank owns: 1-D, empty where other ranks own the whole, everything at stage 0. Tensors are copies on the
parameter's device, in fp32 (fp64 for a parameter of that dtype).

Call each function on all ranks, with the same parameters in the same order: at stage 1 and up most communicate. A
gradient is the mean over ranks that the next step uses, before clipping and with the loss scale taken out; it is there
from the backward of the accumulation boundary to the step. A parameter that no engine trains has nothing to show:
reading gives None, changing is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..memory.layout import Bucket, Fragment, Placement
from ..memory.tiers import Chunk
from ..optim.segments import is_elementwise
from .optimizer import ShardedOptimizer

_OWNERS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""For each such parameter a weak reference to its optimizer, and its name there."""


def make_inspectable(optimizer: ShardedOptimizer) -> None:
    """Let the functions of this module find ``optimizer`` by the parameters that it trains, or may train later."""
    reference = weakref.ref(optimizer)
    for name, parameter in {**optimizer.flat.parameters, **optimizer.frozen.waiting}.items():
        _OWNERS[parameter] = reference, name


# -- whole values --------------------------------------------------------------------------------------------------------


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """The fp32 value of ``param``, in its shape; None for a parameter that is not trained."""
    home = _find(param)
    return None if home is None else _gathered([home], [home.master_part()])[0]


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """The fp32 gradient of ``param``, in its shape; None where it is not trained or nothing has been reduced yet."""
    home = _find(param)
    gradient = None if home is None else _local_gradient(home)
    return None if home is None or gradient is None else _gathered([home], [gradient])[0]


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """The optimizer's state ``optim_state_key`` (``exp_avg``, say) of ``param``, in its shape; 0-dim for a state that
    is one number. None for a parameter that is not trained. Raises KeyError, with the keys that there are, for another
    key, and for a parameter that has had no gradient yet."""
    home = _find(param)
    if home is None:
        return None
    state = home.state(optim_state_key)
    return state if not state.dim() else _gathered([home], [state])[0]


@torch.no_grad()
def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Give ``param`` the fp32 ``value`` (of its shape, the same on all ranks), and the model the value rounded."""
    home = _found(param)
    whole = home.checked(value, home.shape)
    home.set_master_part(home.part_of(whole))
    home.set_parameter(param, whole)


@torch.no_grad()
def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Let the next step use the gradient ``value`` (of ``param``'s shape, the same on all ranks). Raises RuntimeError
    where no gradient has been reduced yet."""
    home = _found(param)
    _set_local_gradient(home, home.part_of(home.checked(value, home.shape)))


@torch.no_grad()
def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Set the optimizer's state ``optim_state_key`` of ``param`` to ``value`` (of its shape, the same on all ranks).
    Raises KeyError for a key that the optimizer does not have."""
    home = _found(param)
    whole = home.checked(value, home.shape)
    home.set_state(optim_state_key, home.part_of(whole))


@torch.no_grad()
def safe_update_full_grad_vectorized(
    param_list: Iterable[nn.Parameter], update_func: Callable[[Tensor, nn.Parameter], Tensor]
) -> None:
    """Replace the full gradient of each parameter by ``update_func(gradient, parameter)``, with one communication for
    all. Parameters without a gradient (not trained, or nothing reduced yet) are passed over."""
    found = [(home, param) for param in param_list if (home := _find(param)) is not None]
    local = [(home, param, part) for home, param in found if (part := _local_gradient(home)) is not None]
    for group in _by_optimizer(local):
        gradients = _gathered([home for home, _, _ in group], [part for _, _, part in group])
        for (home, param, _), gradient in zip(group, gradients, strict=True):
            updated = home.checked(update_func(gradient, param), home.shape)
            _set_local_gradient(home, home.part_of(updated))


# -- what this rank owns -------------------------------------------------------------------------------------------------


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor | None:
    """This rank's part of the fp32 value of ``param``, 1-D; None for a parameter that is not trained."""
    home = _find(param)
    return None if home is None else home.master_part()


def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    """This rank's part of the fp32 gradient of ``param``, 1-D; None where it is not trained or nothing has been
    reduced yet."""
    home = _find(param)
    return None if home is None else _local_gradient(home)


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """This rank's part of the optimizer's state ``optim_state_key`` of ``param``, 1-D; 0-dim for a state that is one
    number. None for a parameter that is not trained. Raises KeyError for a key that the optimizer does not have."""
    home = _find(param)
    if home is None:
        return None
    return home.state(optim_state_key)


@torch.no_grad()
def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Set this rank's part of the fp32 value of ``param``; the model's value is then put together from all ranks'."""
    home = _found(param)
    home.set_master_part(home.checked(value, home.local_shape))
    home.set_parameter(param, _gathered([home], [home.master_part()])[0])


@torch.no_grad()
def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    """Set this rank's part of the gradient that the next step uses. Raises RuntimeError where no gradient has been
    reduced yet."""
    home = _found(param)
    _set_local_gradient(home, home.checked(value, home.local_shape))


@torch.no_grad()
def safe_set_local_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Set this rank's part of the optimizer's state ``optim_state_key`` of ``param``. Raises KeyError for a key that
    the optimizer does not have."""
    home = _found(param)
    home.set_state(optim_state_key, home.checked(value, home.local_shape))


# -- where a parameter's values lie --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Home:
    """A parameter's place in its optimizer's flat slices."""

    optimizer: ShardedOptimizer
    bucket: Bucket
    placement: Placement

    @property
    def name(self) -> str:
        return self.placement.spec.name

    @property
    def device(self) -> torch.device:
        return self.optimizer.flat.masters[self.bucket.index].device

    @property
    def chunk(self) -> Chunk:
        return self.optimizer.flat.chunks[self.bucket.index]

    def master_part(self) -> Tensor:
        """A copy of what this rank's master has of the parameter."""
        with self.chunk.reading():
            return self.own_part(self.optimizer.flat.masters[self.bucket.index])

    def set_master_part(self, values: Tensor) -> None:
        with self.chunk.changing():
            self.set_own_part(self.optimizer.flat.masters[self.bucket.index], values)

    @cached_property
    def fragment(self) -> Fragment | None:
        """The part that this rank owns, None where it owns nothing of the parameter."""
        shard = self.optimizer.shards[self.bucket.index]
        return next((f for f in shard.fragments if f.spec.name == self.name), None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's, whether or not it is released."""
        return self.placement.spec.shape

    @property
    def local_shape(self) -> tuple[int]:
        return (self.fragment.numel if self.fragment is not None else 0,)

    def own_part(self, flat: Tensor) -> Tensor:
        """A copy, in at least fp32, of what ``flat``, a slice of the bucket, has of the parameter."""
        return _wide_copy(flat[self.fragment.slice_range] if self.fragment is not None else flat[:0])

    def set_own_part(self, flat: Tensor, values: Tensor) -> None:
        if self.fragment is not None:
            flat[self.fragment.slice_range] = values.to(flat.device, flat.dtype)

    def set_parameter(self, param: nn.Parameter, whole: Tensor) -> None:
        """Give the model the value ``whole``, rounded to its dtype."""
        self.optimizer.flat.settle()
        with self.chunk.changing():
            self.set_own_part(self.optimizer.flat.own_slice(self.bucket), self.part_of(whole))
        if param.numel():
            param.copy_(whole)

    def part_of(self, whole: Tensor) -> Tensor:
        """What of a value in the parameter's shape belongs to this rank, 1-D."""
        if self.fragment is None:
            return whole.reshape(-1)[:0]
        start = self.fragment.parameter_start
        return whole.reshape(-1)[start : start + self.fragment.numel]

    def checked(self, value: Tensor, shape: Sequence[int]) -> Tensor:
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"{self.name}: the value has shape {tuple(value.shape)}, expected {tuple(shape)}")
        return value.detach()

    def state(self, key: str) -> Tensor:
        """A copy of this rank's part of a state, 1-D and in at least fp32; 0-dim for a state that is one number. A
        collective call."""
        with self.chunk.reading():
            state = self._state(key)
            return _wide_copy(state) if state.dim() else state.clone()

    def set_state(self, key: str, values: Tensor) -> None:
        """Change this rank's part of a state. A collective call."""
        with self.chunk.changing():
            state = self._state(key)
            if not state.dim():
                raise KeyError(f"{self.name}: the state '{key}' is one for many parameters; it cannot be set for one alone")
            state.copy_(values)

    def _state(self, key: str) -> Tensor:
        if not self.placement.spec.numel:
            return torch.empty(0, device=self.device)
        states = self._states()
        if key not in states:
            kind = type(self.optimizer.optimizer).__name__
            has = f"it has {', '.join(states)}" if states else "it has none before its first step"
            raise KeyError(f"{self.name}: the optimizer {kind} has no state '{key}'; {has}")
        return states[key]

    def _states(self) -> dict[str, Tensor]:
        """All states of the parameter. A rank that owns nothing of it learns their names and numbers from one that does."""
        mine = self._own_states()
        if not self.optimizer.policy.shard_optimizer:
            return mine or {}
        known = {key: _empty_or_number(value) for key, value in mine.items()} if mine is not None else None
        everyone = self.optimizer.groups.shards.gather_objects(known, purpose=f"look at the states of '{self.name}'")
        if mine is not None:
            return mine
        theirs: dict[str, Tensor] = next((states for states in everyone if states is not None), {})
        return {key: value.to(self.device) for key, value in theirs.items()}

    def _own_states(self) -> dict[str, Tensor] | None:
        if self.fragment is None:
            return None
        segments = self.optimizer.segments.of(self.optimizer.shards[self.bucket.index])
        segment = next(s for s in segments if self.fragment in s.fragments)
        states = self.optimizer.state.get(segment.tensor, {})
        return {
            key: value[segment.part(self.fragment)] if is_elementwise(value, segment.tensor) else value
            for key, value in states.items()
            if isinstance(value, Tensor)
        }


def _empty_or_number(state: Tensor) -> Tensor:
    return torch.empty(0, dtype=state.dtype) if state.dim() else state.cpu()


def _wide_copy(part: Tensor) -> Tensor:
    """A copy in at least fp32."""
    return part.detach().to(torch.promote_types(part.dtype, torch.float32), copy=True)


def _find(param: nn.Parameter) -> _Home | None:
    reference, name = _OWNERS.get(param, (None, ""))
    optimizer = reference() if reference is not None else None
    if optimizer is None or not optimizer.shards or name not in optimizer.flat.layout.homes:
        return None
    optimizer.flat.presence.require(f"looking at '{name}'")
    bucket, placement = optimizer.flat.layout.homes[name]
    return _Home(optimizer, bucket, placement)


def _found(param: nn.Parameter) -> _Home:
    home = _find(param)
    if home is None:
        raise ValueError(
            f"the parameter of shape {tuple(param.shape)} is trained by no engine: it is frozen, was not given to "
            "deepspeed.initialize, or its engine was destroyed"
        )
    return home


def _local_gradient(home: _Home) -> Tensor | None:
    reducer = home.optimizer.reducer
    if reducer.gradient(home.bucket) is None:
        return None
    late = torch.tensor([float(flag) for flag in reducer.late()], device=home.device)
    purpose = f"look at the gradient of '{home.name}'"
    reducer.reduce_late([flag > 0 for flag in home.optimizer.communicator.sum_in_rank_order(late, purpose=purpose).tolist()])
    gradient = reducer.gradient(home.bucket)
    assert gradient is not None, "a bucket that was reduced keeps its gradient until the step"
    with home.chunk.reading():
        return home.own_part(gradient).div_(home.optimizer.loss_scale)


def _set_local_gradient(home: _Home, values: Tensor) -> None:
    gradient = home.optimizer.reducer.gradient(home.bucket)
    if gradient is None:
        raise RuntimeError(
            f"{home.name}: there is no gradient to set; it can be set between the backward of the accumulation boundary "
            "and the step"
        )
    with home.chunk.changing():
        home.set_own_part(gradient, values * home.optimizer.loss_scale)
        if (tier := home.optimizer.reducer.tier_of(home.bucket)) is not None:
            tier.changed(gradient)
    # A step leaves parameters alone that no backward reached; this one is to be stepped.
    home.optimizer.reducer.used.add(home.name)


def _gathered(homes: Sequence[_Home], parts: Sequence[Tensor]) -> list[Tensor]:
    """The whole values of which ``parts`` are this rank's, each in its parameter's shape. All of one optimizer."""
    optimizer = homes[0].optimizer
    sizes = [home.placement.spec.numel for home in homes]
    flat = parts[0].new_zeros(sum(sizes))
    wholes = [whole.view(home.placement.spec.shape) for whole, home in zip(flat.split(sizes), homes, strict=True)]
    for home, whole, part in zip(homes, wholes, parts, strict=True):
        home.part_of(whole).copy_(part)
    if optimizer.policy.shard_optimizer:
        # Every element is one rank's own and zero on the others, so that the sum is exact.
        optimizer.groups.shards.all_reduce(flat, purpose=f"gather of the values of '{homes[0].name}'").wait()
    return wholes


def _by_optimizer(
    found: Iterable[tuple[_Home, nn.Parameter, Tensor]],
) -> list[list[tuple[_Home, nn.Parameter, Tensor]]]:
    groups: dict[int, list[tuple[_Home, nn.Parameter, Tensor]]] = {}
    for item in found:
        groups.setdefault(id(item[0].optimizer), []).append(item)
    return list(groups.values())
