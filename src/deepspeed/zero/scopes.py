"""Hooks that make a module's units whole while it runs, forward and backward.

One call of a module that needs units:

1. before its forward, the units are held; its inputs get a hook;
2. after its forward, or an exception in it, they are let go; its outputs get a hook;
3. when the gradient of an output arrives, backward comes to the module: the units are held again;
4. when the gradients of all its inputs are there, or the whole backward has ended, they are let go.

Hooks sit on modules, not on the engine: calling a module of the model directly works as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import register_multi_grad_hook

from .external import external_parameters
from .fetching import UnitFetcher
from .loading import gather_while_loading
from .released import home_of
from .units import ParameterUnit, refuse


class ModuleScopes:
    """Runs the modules of ``needs`` with their units whole. ``needs`` is by module."""

    def __init__(self, fetcher: UnitFetcher, needs: Mapping[nn.Module, Sequence[ParameterUnit]]):
        self.fetcher = fetcher
        self._running: list[_Call] = []
        self.backward_under_way: dict[_Backward, None] = {}
        self._hooks = [hook for module, units in needs.items() for hook in self._attach(module, tuple(units))]
        self._hooks += gather_while_loading(needs)
        for unit in fetcher.units:
            unit.on_touch = self._on_touch

    @contextmanager
    def backward(self) -> Iterator[None]:
        """A backward runs inside; at its end nothing of it is held."""
        try:
            yield
        finally:
            self.end_backward()

    def end_backward(self) -> None:
        """Let go of what backwards hold: none runs any more."""
        for backward in list(self.backward_under_way):
            backward.leave()
        self.fetcher.end_backward()

    def close(self) -> None:
        """Take the hooks off the modules."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _attach(self, module: nn.Module, units: tuple[ParameterUnit, ...]) -> Iterator[Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._enter([*units, *_external_units(module, units)], args, kwargs)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._leave(output)

        # The first to run before the module's own hooks, the last after them: they may use its parameters.
        yield module.register_forward_pre_hook(_not_compiled(before), prepend=True, with_kwargs=True)
        yield module.register_forward_hook(_not_compiled(after), always_call=True)

    def _enter(self, units: list[ParameterUnit], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _Call(units)
        if torch.is_grad_enabled() and not self._is_within(units):
            call.backward = _Backward(self, call.units)
            inputs = _differentiable([args, kwargs])
            call.inputs = {(id(tensor), tensor._version) for tensor in inputs}
            _when_all_gradients_are_there(inputs, call.backward.leave)
        self._running.append(call)
        self.fetcher.hold(units)

    def _leave(self, output: Any) -> None:
        call = self._running.pop()
        if call.backward is not None:
            for tensor in _differentiable(output):
                # What a module hands through has its gradient when the module's backward is over.
                if (id(tensor), tensor._version) not in call.inputs:
                    tensor.register_hook(call.backward.enter)
        self.fetcher.let_go(call.units)

    def _is_within(self, units: Sequence[ParameterUnit]) -> bool:
        """Whether a module that runs has ``units`` among its own, so that its backward is theirs."""
        covered = {unit.index for call in self._running if call.backward is not None for unit in call.units}
        return all(unit.index in covered for unit in units)

    def _on_touch(self, unit: ParameterUnit, parameter: nn.Parameter, operation: str) -> None:
        """A parameter is used outside its module: its unit joins the needs of the module that runs."""
        if not self._running:
            refuse(unit, parameter, operation)
        call = next((call for call in reversed(self._running) if call.backward is not None), self._running[-1])
        call.units.append(unit)
        self.fetcher.hold([unit])


@dataclass(eq=False)
class _Call:
    """A module that is running forward. ``inputs`` are those with a gradient, by identity and version."""

    units: list[ParameterUnit]
    backward: _Backward | None = None
    inputs: set[tuple[int, int]] = field(default_factory=set)


class _Backward:
    """The backward of one call of a module. It may run more than once (``retain_graph``)."""

    def __init__(self, scopes: ModuleScopes, units: list[ParameterUnit]):
        self._scopes = scopes
        self._units = units
        self._held: list[ParameterUnit] = []

    def enter(self, _: object = None) -> None:
        if not self._held:
            self._held = list(self._units)
            self._scopes.backward_under_way[self] = None
            self._scopes.fetcher.hold(self._held)

    def leave(self, _: object = None) -> None:
        if self._held:
            held, self._held = self._held, []
            del self._scopes.backward_under_way[self]
            self._scopes.fetcher.let_go(held)


def _external_units(module: nn.Module, own: Sequence[ParameterUnit]) -> list[ParameterUnit]:
    """The units of parameters that were registered as external to ``module``."""
    homes = {id(home): home for p in external_parameters(module) if isinstance(home := home_of(p), ParameterUnit)}
    return [home for home in homes.values() if home not in own]


def _not_compiled(hook: Callable[..., None]) -> Callable[..., None]:
    """``hook`` as it is: torch.compile does not look into it."""
    disabled: Callable[..., None] = torch.compiler.disable(hook)
    return disabled


def _when_all_gradients_are_there(tensors: Sequence[Tensor], then: Callable[[object], None]) -> None:
    if any(tensor.is_leaf for tensor in tensors):
        # The gradient of a leaf may come before those of parameters: wait for the end of its (re-entrant) backward.
        at_the_end = then
        then = lambda _: Variable._execution_engine.queue_callback(lambda: at_the_end(None))  # noqa: E731
    if len(tensors) == 1:
        tensors[0].register_hook(then)
    elif tensors:
        register_multi_grad_hook(tensors, then)


def _differentiable(value: Any) -> list[Tensor]:
    """The tensors with a gradient in ``value``: in tuples, lists, mappings and dataclasses."""
    return list({id(t): t for t in _tensors(value, depth=4) if t.requires_grad}.values())


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth > 0:
        for item in _items(value):
            yield from _tensors(item, depth - 1)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple)):
        return value
    return vars(value).values() if is_dataclass(value) and not isinstance(value, type) else ()
