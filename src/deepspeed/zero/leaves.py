"""Leaf modules of stage 3: modules whose parameters are fetched at once, with those of all modules inside.

A mixture of experts is one: ranks route to different experts, and must not fetch in different orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

LEAF = "_z3_leaf"
"""The attribute that marks a leaf module; integrations read it."""


def set_z3_leaf_modules(model: nn.Module, leaf_module_classes: Iterable[type[nn.Module] | str]) -> list[nn.Module]:
    """Mark the modules of the given classes (or of classes with the given names) as leaves, and return them.

    Call it before ``deepspeed.initialize``. Raises ValueError where ``model`` has no such module.
    """
    wanted = list(leaf_module_classes)
    names = [item if isinstance(item, str) else f"{item.__module__}.{item.__qualname__}" for item in wanted]
    return _mark(model, _chosen(names, (), ()), f"of the classes {', '.join(names)}")


def set_z3_leaf_modules_by_name(model: nn.Module, leaf_module_names: Iterable[str]) -> list[nn.Module]:
    """Mark the modules of the given names in ``model``, as ``set_z3_leaf_modules`` does."""
    names = list(leaf_module_names)
    return _mark(model, _chosen((), names, ()), f"named {', '.join(names)}")


def set_z3_leaf_modules_by_suffix(model: nn.Module, leaf_module_name_suffixes: Iterable[str]) -> list[nn.Module]:
    """Mark the modules whose names in ``model`` end as given, as ``set_z3_leaf_modules`` does."""
    suffixes = list(leaf_module_name_suffixes)
    return _mark(model, _chosen((), (), suffixes), f"whose names end in {', '.join(suffixes)}")


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Mark ``model`` itself as a leaf, or not."""
    setattr(model, LEAF, flag)


def unset_z3_leaf_modules(model: nn.Module, leaf_module_classes: Iterable[type[nn.Module] | str]) -> list[nn.Module]:
    """Take the marks of the given classes away again, and return the modules."""
    names = [c if isinstance(c, str) else f"{c.__module__}.{c.__qualname__}" for c in leaf_module_classes]
    found = [m for name, m in model.named_modules() if _chosen(names, (), ())(name, m)]
    for module in found:
        set_z3_leaf_module(module, False)
    return found


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that are marked as leaves."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether ``model`` is marked as a leaf."""
    return bool(getattr(model, LEAF, False))


def leaf_predicate(classes: Iterable[str], names: Iterable[str], suffixes: Iterable[str]) -> Callable[[str, nn.Module], bool]:
    """Whether a module, given with its name in the model, is marked or is one of those named. A class is named with or
    without its module."""
    chosen = _chosen(classes, names, suffixes)
    return lambda name, module: z3_leaf_module(module) or chosen(name, module)


def _chosen(classes: Iterable[str], names: Iterable[str], suffixes: Iterable[str]) -> Callable[[str, nn.Module], bool]:
    of_class, by_name, by_suffix = frozenset(classes), frozenset(names), tuple(suffixes)

    def is_chosen(name: str, module: nn.Module) -> bool:
        kind = type(module)
        return (
            kind.__name__ in of_class
            or f"{kind.__module__}.{kind.__qualname__}" in of_class
            or name in by_name
            or (bool(by_suffix) and name.endswith(by_suffix))
        )

    return is_chosen


def _mark(model: nn.Module, chosen: Callable[[str, nn.Module], bool], which: str) -> list[nn.Module]:
    found = [module for name, module in model.named_modules() if chosen(name, module)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no module {which}: nothing was marked as a leaf of ZeRO stage 3")
    for module in found:
        set_z3_leaf_module(module, True)
    return found
