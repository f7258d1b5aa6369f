"""Construct a model in shards: each module's parameters are sharded as soon as the module is complete.

Nothing of torch is replaced. torch calls hooks when a module registers a parameter, and when it registers a submodule:
then the submodule is complete, its initialization included, and its own parameters become a unit. What is in no module
(the outermost one's own parameters) is sharded at the end of the context.

Code that initializes weights afterwards works: a parameter that is touched is gathered, and what was written on rank 0 is
everyone's when others are touched, or at the end.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..comm.communicator import Communicator
from ..memory.layout import FlatLayout, ParameterSpec
from .parameters import FlatParameters, unchanged
from .released import home_of
from .units import ParameterUnit, Replica, UnitPart

HELD_WHILE_TOUCHED = 4
"""Units that stay gathered while code initializes parameters: an operation may read one and write another."""


class ModuleSharder:
    """Shards modules over the ranks of ``communicator``, a unit each, in ``dtype`` (the parameters' own where None).
    Parameters of up to ``resident_numel`` elements stay whole on every rank."""

    def __init__(self, communicator: Communicator, *, dtype: torch.dtype | None, resident_numel: int):
        self._communicator = communicator
        self._dtype = dtype
        self._resident_numel = resident_numel
        self._incomplete: dict[int, nn.Module] = {}
        self._touched: list[ParameterUnit] = []
        self._units: list[ParameterUnit] = []

    def parameter_registered(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Remember that ``module`` has parameters of its own."""
        if parameter is not None and home_of(parameter) is None:
            self._incomplete[id(module)] = module

    def module_registered(self, parent: nn.Module, name: str, module: nn.Module | None) -> None:
        """Shard ``module``, which is complete, and what is inside it."""
        if module is not None:
            self.shard(module)

    def shard(self, module: nn.Module) -> None:
        """Shard ``module`` and what is inside it, where that has not happened."""
        for inner in module.modules():
            if self._incomplete.pop(id(inner), None) is not None:
                self._shard_own(inner)

    def shard_all(self, module: nn.Module) -> None:
        """Shard every parameter of a ``module`` that was constructed before."""
        for inner in module.modules():
            self._shard_own(inner)

    def finish(self) -> None:
        """Shard what is left, and take over what was written into sharded parameters."""
        for module in list(self._incomplete.values()):
            self._shard_own(module)
        self._incomplete.clear()
        self._keep_touched(0)
        for unit in self._units:
            unit.refuse_touches()
        self._units.clear()

    @torch.no_grad()
    def _shard_own(self, module: nn.Module) -> None:
        own = {name: p for name, p in module.named_parameters(recurse=False) if home_of(p) is None and not p.is_meta}
        for name in [name for name, p in own.items() if p.numel() <= self._resident_numel]:
            parameter = own.pop(name)
            parameter.data = parameter.data.to(self._dtype_of(parameter))
            self._communicator.broadcast(parameter.data).wait()
            Replica(parameter, self._communicator)
        if not own:
            return
        specs = [
            ParameterSpec(name, tuple(p.shape), str(self._dtype_of(p)).removeprefix("torch."), unit=0)
            for name, p in own.items()
        ]
        layout = FlatLayout.build(specs, shards=self._communicator.size, bucket_numel=0)
        flat = FlatParameters(layout, own, shard=self._communicator.rank, master_dtype=unchanged)
        parts = []
        for bucket in flat.move_in(self._communicator):
            parts.append(UnitPart(flat, bucket))
            parts[-1].release()
        unit = ParameterUnit(0, type(module).__name__, parts, self._communicator)
        unit.on_touch = self._on_touch
        self._units.append(unit)

    def _dtype_of(self, parameter: nn.Parameter) -> torch.dtype:
        return self._dtype if self._dtype is not None and parameter.is_floating_point() else parameter.dtype

    def _on_touch(self, unit: ParameterUnit, parameter: nn.Parameter, operation: str) -> None:
        self._keep_touched(HELD_WHILE_TOUCHED - 1)
        unit.hold()
        self._touched.append(unit)

    def _keep_touched(self, remaining: int) -> None:
        while len(self._touched) > remaining:
            unit = self._touched.pop(0)
            for parameter in unit.parameters():
                unit.keep(parameter, source=0)
            unit.let_go()


class SharderContext:
    """While it is entered, ``sharder`` hears of every module and parameter that is registered in this process. Inside
    another one it does nothing: a model has one sharder."""

    def __init__(self, sharder: ModuleSharder):
        self._sharder = sharder
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        if not _is_entered():
            self._hooks = [
                torch_module.register_module_parameter_registration_hook(self._sharder.parameter_registered),
                torch_module.register_module_module_registration_hook(self._sharder.module_registered),
            ]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if error is None:
            self._sharder.finish()


def _is_entered() -> bool:
    hooks = torch_module._global_module_registration_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), ModuleSharder) for hook in hooks)
