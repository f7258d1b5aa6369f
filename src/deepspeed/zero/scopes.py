"""Hooks that make a module's units whole while it runs, forward and backward.

One call of a module that needs units:

1. before its forward, the units are held; its inputs get a hook;
2. after its forward, or an exception in it, they are let go; its outputs get a hook;
3. when the gradient of an output arrives, backward comes to the module: the units are held again;
4. when the gradient of an input arrives, or the whole backward has ended, they are let go.

Autograd goes through the nodes of a graph in the opposite of the order in which they were made. So what comes to an
input has been through all of the module, and modules are left in the opposite of the order in which they were called.

Hooks sit on modules, not on the engine: calling a module of the model directly works as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from .external import external_parameters
from .fetching import UnitFetcher
from .loading import gather_while_loading
from .nested import differentiable, made_since, next_node
from .released import home_of, missed_by_autograd
from .units import ParameterUnit, refuse


class ModuleScopes:
    """Runs the modules of ``needs`` with their units whole. ``needs`` is by module. ``unit_done`` is told the index of each
    unit whose backward is over, in the same order on all ranks."""

    def __init__(self, fetcher: UnitFetcher, needs: Mapping[nn.Module, Sequence[ParameterUnit]]):
        self.fetcher = fetcher
        self._running: list[_Call] = []
        self._under_way: dict[_Backward, None] = {}
        self.unit_done: Callable[[int], None] = lambda unit: None
        self._to_come: Counter[int] = Counter()
        self._scopes = tuple(_scopes(needs))
        self._loading = tuple(gather_while_loading(needs))
        self.hooks: list[Any] = []
        self.attach()
        for unit in fetcher.units:
            unit.on_touch = self._on_touch
            unit.on_hold = self._on_hold

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward runs inside; at its end none of its modules runs, whatever ended it."""
        depth = len(self._running)
        try:
            yield
        finally:
            while len(self._running) > depth:
                self._leave(None)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """A backward runs inside; at its end nothing of it is held. Raises RuntimeError where it comes to what autograd
        saved of a parameter while that is released."""
        try:
            yield
        except BaseException as error:
            for backward in list(self._under_way):
                backward.abandon()
            self.fetcher.end_backward()
            if (identifier := missed_by_autograd(error)) is not None:
                self._refuse_backward(identifier, error)
            raise
        self.end_backward()

    def end_backward(self) -> None:
        """Let go of what backwards hold: none runs any more."""
        for backward in list(self._under_way):
            backward.leave()
        self.fetcher.end_backward()

    def settle(self) -> None:
        """Let go of what backwards hold, and expect no more of them: the parameters are about to change."""
        self.end_backward()
        self._to_come.clear()
        for unit in self.fetcher.units:
            unit.forget_second_copy()

    def entered(self, backward: _Backward, units: Sequence[ParameterUnit]) -> None:
        """``backward`` has come to ``units``."""
        self._under_way[backward] = None
        self.fetcher.hold(units)

    def left(self, backward: _Backward, units: Sequence[ParameterUnit]) -> None:
        """``backward`` has left ``units``, or never will come to their end."""
        del self._under_way[backward]
        self.fetcher.let_go(units)

    def passed(self, units: Sequence[ParameterUnit]) -> None:
        """One of the backwards of ``units`` is over."""
        for unit in units:
            self._to_come[unit.index] -= 1
            if self._to_come[unit.index] <= 0:
                self.unit_done(unit.index)

    def attach(self) -> None:
        """Put the hooks onto the modules, also where somebody took some of them off."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = [hook for scope in self._scopes for hook in self._attach(scope)]

    def close(self) -> None:
        """Take the hooks off the modules, for good."""
        self._scopes = ()
        self.attach()
        for hook in self._loading:
            hook.remove()

    def _attach(self, scope: _Scope) -> Iterator[Any]:
        # A copy of the module has these hooks too, and parameters of its own.
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is scope.module and not self._is_within(scope):
                self._enter(scope, [args, kwargs])

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            # Called too for modules that run within others, and where another hook raised before ours has begun.
            running = bool(self._running) and self._running[-1].scope.module is module
            return self._leave(output) if running else None

        # The first to run before the module's own hooks, the last after them: they may use its parameters.
        yield scope.module.register_forward_pre_hook(torch.compiler.disable(before), prepend=True, with_kwargs=True)
        yield scope.module.register_forward_hook(torch.compiler.disable(after), always_call=True)

    def _enter(self, scope: _Scope, arguments: Any) -> None:
        units = [*scope.units, *_external_units(scope)]
        call = _Call(scope, units)
        if torch.is_grad_enabled():
            call.backward = _Backward(self, call.units)
            _when_backward_has_passed(differentiable(arguments), call.backward.leave)
        self._running.append(call)
        self.fetcher.hold(units)

    def _leave(self, output: Any) -> Any:
        call = self._running.pop()
        if call.backward is not None and call.backward.units:
            if not made_since(call.first_node, output):
                output = _passing(output)
            if not _in_backward():
                self._to_come.update(unit.index for unit in call.backward.units)
            for tensor in made_since(call.first_node, [output, call.scope.kept()]):
                tensor.register_hook(call.backward.enter)
        self.fetcher.let_go(call.units)
        return output

    def _is_within(self, scope: _Scope) -> bool:
        """Whether a module that runs has the units of ``scope`` among its own, forward and backward."""
        if external_parameters(scope.module):
            return False
        differentiated = torch.is_grad_enabled()
        return any(
            call.covers(scope.units) for call in reversed(self._running) if call.backward is not None or not differentiated
        )

    def _on_touch(self, unit: ParameterUnit, parameter: nn.Parameter, operation: str) -> None:
        """A parameter is used outside its module: its unit joins the needs of the module that runs."""
        if not self._running:
            refuse(unit, parameter, operation)
        call = self._user()
        call.units.append(unit)
        if call.backward is not None:
            call.backward.need(unit)
        self.fetcher.hold([unit])

    def _on_hold(self, unit: ParameterUnit) -> None:
        """A unit is gathered by hand: what the module that runs computes with it has a backward."""
        if self._running and torch.is_grad_enabled() and (backward := self._user().backward) is not None:
            backward.need(unit)

    def _user(self) -> _Call:
        """The innermost running module, of those with a backward where there are any."""
        return next((call for call in reversed(self._running) if call.backward is not None), self._running[-1])

    def _refuse_backward(self, identifier: int, error: BaseException) -> NoReturn:
        parameters = ((unit, p) for unit in self.fetcher.units for p in unit.parameters())
        unit, parameter = next((u, p) for u, p in parameters if p.ds_id == identifier)  # type: ignore[attr-defined]
        raise RuntimeError(
            f"backward needs {unit.describe(parameter)} outside the backward of the modules that computed with it: "
            "a tensor came from inside a module to the loss by another way than its outputs and attributes, or gradients "
            "are differentiated again. Return it from the module's forward, or call engine.backward inside "
            "deepspeed.zero.GatheredParameters(model.parameters())"
        ) from error


@dataclass(frozen=True)
class _Scope:
    """A module that computes with ``units``. ``inner`` are it and the modules inside that do with no others."""

    module: nn.Module
    units: tuple[ParameterUnit, ...]
    inner: tuple[nn.Module, ...]

    def kept(self) -> list[Any]:
        """What a forward may leave behind as attributes, as losses are."""
        return [value for module in self.inner for value in islice(vars(module).values(), _OF_EVERY_MODULE, None)]


_OF_EVERY_MODULE = len(vars(nn.Module()))
"""How many attributes a module has before it is given its own."""


def _scopes(needs: Mapping[nn.Module, Sequence[ParameterUnit]]) -> Iterator[_Scope]:
    for module, units in needs.items():
        inner = (m for m in module.modules() if all(unit in units for unit in needs.get(m, ())))
        yield _Scope(module, tuple(units), tuple(inner))


@dataclass(eq=False)
class _Call:
    """A scope's module that is running forward. ``first_node`` is the number of the first autograd node that it may
    make."""

    scope: _Scope
    units: list[ParameterUnit]
    backward: _Backward | None = None
    first_node: int = field(default_factory=next_node)

    def covers(self, units: Sequence[ParameterUnit]) -> bool:
        """Whether this call has units, and all of ``units`` among them."""
        return bool(self.units) and all(unit in self.units for unit in units)


class _Backward:
    """The backward of one call of a module, which needs ``units``. It may run more than once (``retain_graph``)."""

    def __init__(self, scopes: ModuleScopes, units: Sequence[ParameterUnit]):
        self.units = list(units)
        self._scopes = scopes
        self._held: list[ParameterUnit] = []

    def need(self, unit: ParameterUnit) -> None:
        if unit not in self.units:
            self.units.append(unit)

    def enter(self, _: object = None) -> None:
        if not self._held:
            self._held = list(self.units)
            self._scopes.entered(self, self._held)

    def leave(self, _: object = None) -> None:
        if held := self.abandon():
            self._scopes.passed(held)

    def abandon(self) -> list[ParameterUnit]:
        held, self._held = self._held, []
        if held:
            self._scopes.left(self, held)
        return held


def _external_units(scope: _Scope) -> list[ParameterUnit]:
    """The units of parameters that were registered as external to the scope's module."""
    homes = {id(home): home for p in external_parameters(scope.module) if isinstance(home := home_of(p), ParameterUnit)}
    return [home for home in homes.values() if home not in scope.units]


def _passing(output: Any) -> Any:
    """``output``, of a module that did nothing on this rank, with a node of its own where it is a tensor or begins with
    one: backward then comes by, and fetches what other ranks may need."""
    if isinstance(output, Tensor) and output.requires_grad:
        return output.view_as(output)
    return (_passing(output[0]), *output[1:]) if type(output) is tuple and output else output


def _in_backward() -> bool:
    """Whether autograd runs a backward now, in which modules are called to recompute."""
    return torch._C._current_graph_task_id() != -1


def _when_backward_has_passed(inputs: Sequence[Tensor], then: Callable[[object], None]) -> None:
    made = [tensor for tensor in inputs if not tensor.is_leaf]
    if not made and inputs:
        # The gradient of a leaf may come before those of parameters: wait for the end of its (re-entrant) backward.
        inputs[0].register_hook(lambda _: Variable._execution_engine.queue_callback(lambda: then(None)))
    for tensor in made:
        tensor.register_hook(then)
