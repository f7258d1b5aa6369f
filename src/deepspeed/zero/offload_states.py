"""Taking an engine's states off its device for a while, and back.

Tensors of a state are views of few storages, and other tensors are views of the same: segments, parameters, slices. A
storage is emptied, not replaced: all that are views of it find the values again when it is filled. Where states share a
storage (the fp32 values of an fp32 model are its parameters) it goes when all of them are away.

Meanwhile a parameter whose storage is empty has the shape (0,), and every module refuses to run. What is on the CPU
already has nowhere to go, and keeps its memory; that it is away is remembered all the same, so that a program is right or
wrong on any device alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor, UntypedStorage, nn

from ..memory.tiers import id_of
from .optimizer import ShardedOptimizer
from .presence import OffloadStateTypeEnum
from .sharding import ShardedModel

States = OffloadStateTypeEnum


class OffloadedStates:
    """The states of ``model`` and of its ``optimizer``, which may be on the CPU for a while."""

    def __init__(self, model: ShardedModel, optimizer: ShardedOptimizer | None):
        self._model = model
        self._optimizer = optimizer
        self._presence = model.trained.presence
        self._emptied: dict[int, _Emptied] = {}
        self._concealed: list[tuple[nn.Parameter, Tensor]] = []
        self._guards: list[torch.utils.hooks.RemovableHandle] = []

    def offload(self, states: Collection[States], *, pin_memory: bool, non_blocking: bool) -> None:
        """Take ``states`` away. Raises RuntimeError inside ``zero.GatheredParameters``."""
        fetcher = self._model.scopes.fetcher
        if any(unit.holds for unit in fetcher.units):
            raise RuntimeError("engine.offload_states() was called inside zero.GatheredParameters: leave the context before")
        fetcher.release_idle()
        if self._optimizer is not None and States.lp_grads in states:
            self._optimizer.reducer.free_idle()
        if States.lp_params in states:
            for unit in fetcher.units:
                unit.forget_second_copy(free=True)
        away = self._presence.away | frozenset(states)
        staying = {id_of(s) for state in frozenset(States) - away for s in _storages(self._tensors(state))}
        for storage in _storages(tensor for state in away for tensor in self._tensors(state)):
            if id_of(storage) not in staying and leaves(storage):
                self._emptied[id_of(storage)] = _Emptied(storage, pin_memory=pin_memory, non_blocking=non_blocking)
        self._presence.away = away
        self._conceal()

    def reload(self, *, non_blocking: bool) -> None:
        """Bring all back."""
        for emptied in self._emptied.values():
            emptied.fill(non_blocking=non_blocking)
        for parameter, values in self._concealed:
            parameter.data = values
        for guard in self._guards:
            guard.remove()
        for forgotten in (self._emptied, self._concealed, self._guards):
            forgotten.clear()
        self._presence.away = frozenset()

    def devices(self, state: States) -> set[torch.device]:
        """Where the memory of ``state`` is."""
        concealed = [values for _, values in self._concealed] if state is States.lp_params else []
        storages = {id_of(t.untyped_storage()): t.untyped_storage() for t in [*self._tensors(state), *concealed]}
        return {
            self._emptied[key].copy.device if key in self._emptied else storage.device
            for key, storage in storages.items()
            if key in self._emptied or storage.nbytes()
        }

    def _tensors(self, state: States) -> Iterator[Tensor]:
        """The tensors of which ``state`` is made."""
        model, optimizer = self._model, self._optimizer
        if state is States.lp_params:
            yield from (t for flat in (model.trained, model.frozen) for t in (*flat.buffers, *flat.slices))
            yield from (p.detach() for p in model.module.parameters())
        elif optimizer is None:
            return
        elif state is States.hp_params:
            yield from model.trained.masters
        elif state is States.optim_states:
            yield from (v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor))
        elif state is States.lp_grads:
            yield from optimizer.reducer.buffers(kept=True)
            yield from (p.grad for p in optimizer.frozen.waiting.values() if p.grad is not None)
        else:
            yield from optimizer.reducer.buffers(kept=False)

    def _conceal(self) -> None:
        """Have what is away refused where it is computed with."""
        for parameter in self._model.module.parameters():
            if id_of(parameter.untyped_storage()) in self._emptied:
                self._concealed.append((parameter, parameter.data))
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        if States.lp_params in self._presence.away and not self._guards:
            modules = self._model.module.named_modules()
            self._guards = [
                inner.register_forward_pre_hook(self._refusal(name or type(inner).__name__), prepend=True)
                for name, inner in modules
            ]

    def _refusal(self, name: str) -> Callable[..., None]:
        def refuse(*_: object) -> None:
            self._presence.require(f"forward of '{name}'", States.lp_params)

        return refuse


class _Emptied:
    """The former content of ``storage``, which has no memory any more."""

    def __init__(self, storage: UntypedStorage, *, pin_memory: bool, non_blocking: bool):
        self._storage = storage
        pinned = pin_memory and storage.device.type != "cpu"
        self.copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned).untyped_storage()
        self.copy.copy_(storage, non_blocking=non_blocking)
        # What the device does next with this memory comes after the copy: both are in the order of its stream.
        storage.resize_(0)

    def fill(self, *, non_blocking: bool) -> None:
        """Put it back."""
        self._storage.resize_(self.copy.nbytes())
        self._storage.copy_(self.copy, non_blocking=non_blocking)


def leaves(storage: UntypedStorage) -> bool:
    """Whether ``storage`` is on a device that it can leave for the CPU."""
    return storage.device.type != "cpu" and storage.resizable()


def _storages(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """The storages of ``tensors`` that have memory, each once."""
    found = {id_of(tensor.untyped_storage()): tensor.untyped_storage() for tensor in tensors}
    return [storage for storage in found.values() if storage.nbytes()]
