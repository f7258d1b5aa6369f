"""``Module.load_state_dict`` on a model whose parameters are sharded: gathered while it is read, sharded again after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .released import home_of
from .units import ParameterUnit, Replica


def gather_while_loading(needs: Mapping[nn.Module, Sequence[ParameterUnit]]) -> list[Any]:
    """Make each module's units whole while it and what is inside it load, on all ranks the same values, and keep these;
    the masters of parameters that are whole anyway follow too. Returns the hooks."""
    return [hook for module, units in needs.items() for hook in _attach(module, units)]


def _attach(module: nn.Module, units: Sequence[ParameterUnit]) -> Iterator[Any]:
    loading: list[ParameterUnit] = []

    def before(*_: Any) -> None:
        # A unit that is held already is somebody else's to keep: an outer module's, or GatheredParameters'.
        loading.extend(unit for unit in units if not unit.holds)
        for unit in loading:
            unit.hold()

    def after(*_: Any) -> None:
        for unit in loading:
            for parameter in unit.parameters():
                unit.keep(parameter, source=None)
            unit.let_go()
        loading.clear()
        for parameter in module.parameters():
            if isinstance(home := home_of(parameter), Replica):
                home.keep(parameter, source=None)

    yield module.register_load_state_dict_pre_hook(before)
    yield module.register_load_state_dict_post_hook(after)
