"""Which parameters are gathered together: a model cut into units.

A unit is a block: a child of a container (``ModuleList``, ``Sequential``, ``ModuleDict``) that has another child of the
same class, with everything inside it. What is in no block is cut at modules: each one's own parameters are a unit. Ranks
may take different branches inside a unit, since all of it is gathered when it begins. A block with a ``TiledLinear`` is
cut into modules as well: its tiles are there to be gathered one by one.

Small parameters belong to no unit: they stay whole on every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from .tiling import TiledLinear

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class UnitLimits:
    """``resident_numel``: parameters of up to so many elements stay whole, until they are ``resident_total`` in all.
    ``largest``: a block of more elements is cut into the blocks and modules inside it. ``is_leaf`` names modules that
    are one unit whatever is inside; so is one of less than ``granularity`` elements per module in it."""

    resident_numel: int
    resident_total: int
    largest: int
    is_leaf: Callable[[str, nn.Module], bool]
    granularity: int = 0


@dataclass(frozen=True)
class UnitPlan:
    """``names[i]`` is the module of unit i, ``unit_of`` the unit of each parameter that has one, by the parameter's first
    name. ``needs`` says which units each module (by name) computes with, of those that have units inside: a block all that
    is inside it, any other module its own parameters, which may be none. ``gives_homes`` says whether each parameter is to
    have a home, a unit or another, from which ``GatheredParameters`` knows it."""

    names: tuple[str, ...]
    unit_of: Mapping[str, int]
    needs: Mapping[str, tuple[int, ...]]
    gives_homes: bool = True


WHOLE = UnitPlan((), {}, {}, gives_homes=False)
"""The plan of what is not sharded: every parameter is whole on every rank, and all write it alike."""


def plan_units(module: nn.Module, numel_of: Callable[[nn.Parameter], int], limits: UnitLimits) -> UnitPlan:
    """Cut ``module`` into units. ``numel_of`` says how many elements a parameter has when it is whole."""
    first_names = {id(p): name for name, p in module.named_parameters()}
    resident = _resident(module, numel_of, limits)
    names: list[str] = []
    unit_of: dict[str, int] = {}
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, parameters, is_block in _cuts("", module, numel_of, limits):
        mine = [first_names[id(p)] for p in parameters]
        mine = [p for p in mine if p not in resident and p not in unit_of]
        unit_of.update({p: len(names) for p in mine})
        names += [name] if mine else []
        if is_block:
            blocks[name] = parameters

    def units_of(parameters: Iterable[nn.Parameter]) -> tuple[int, ...]:
        return tuple(sorted({unit_of[first_names[id(p)]] for p in parameters if first_names[id(p)] in unit_of}))

    needs = {
        name: units_of(blocks.get(name, inner.parameters(recurse=False)))
        for name, inner in module.named_modules()
        if units_of(inner.parameters())
    }
    return UnitPlan(tuple(names), unit_of, needs)


def _resident(module: nn.Module, numel_of: Callable[[nn.Parameter], int], limits: UnitLimits) -> set[str]:
    found, total = set(), 0
    for name, parameter in module.named_parameters():
        numel = numel_of(parameter)
        if numel == 0 or (numel <= limits.resident_numel and total + numel <= limits.resident_total):
            found.add(name)
            total += numel
    return found


def _cuts(
    name: str, module: nn.Module, numel_of: Callable[[nn.Parameter], int], limits: UnitLimits, *, in_block: bool = False
) -> Iterator[tuple[str, list[nn.Parameter], bool]]:
    """The name of each unit's module, its parameters, and whether it is a block, in registration order."""
    inside = list(module.parameters())
    numel = sum(numel_of(p) for p in inside)
    is_fine = numel < limits.granularity * len(list(module.modules()))
    is_tiled = any(isinstance(inner, TiledLinear) for inner in module.modules())
    if limits.is_leaf(name, module) or is_fine or (in_block and numel <= limits.largest and not is_tiled):
        yield name, inside, True
        return
    own = list(module.parameters(recurse=False))
    if own:
        yield name, own, False
    classes = Counter(type(child) for child in module.children())
    for child_name, child in module.named_children():
        repeated = isinstance(module, CONTAINERS) and classes[type(child)] > 1
        path = f"{name}.{child_name}" if name else child_name
        yield from _cuts(path, child, numel_of, limits, in_block=repeated)
