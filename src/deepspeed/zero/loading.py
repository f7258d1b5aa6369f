"""``Module.load_state_dict`` on a model whose parameters are sharded: gathered while it is read, sharded again after.

Shapes are compared first: a state dict that does not fit is refused before anything has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .released import home_of, shape_of
from .units import ParameterUnit, Replica


def gather_while_loading(needs: Mapping[nn.Module, Sequence[ParameterUnit]]) -> list[Any]:
    """Make each module's units whole while it and what is inside it load, on all ranks the same values, and keep these;
    the masters of parameters that are whole anyway follow too. Returns the hooks."""
    return [hook for module, units in needs.items() for hook in _attach(module, units)]


def _attach(mine: nn.Module, units: Sequence[ParameterUnit]) -> Iterator[Any]:
    held: list[ParameterUnit] = []

    # A copy of the module has these hooks too, and parameters of its own.
    def before(module: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
        if module is not mine:
            return
        if not prefix:
            _check(module, state, assign=bool(metadata.get("assign_to_params_buffers")))
        # A unit that is held already is somebody else's to keep: an outer module's, or GatheredParameters'.
        held.extend(unit for unit in units if not unit.holds)
        for unit in held:
            unit.hold()

    def after(module: nn.Module, _: Any) -> None:
        if module is not mine:
            return
        for unit in held:
            for parameter in unit.parameters():
                unit.keep(parameter, source=None)
            unit.let_go()
        held.clear()
        for parameter in module.parameters():
            if isinstance(home := home_of(parameter), Replica):
                home.keep(parameter, source=None)

    yield mine.register_load_state_dict_pre_hook(before)
    yield mine.register_load_state_dict_post_hook(after)


def _check(module: nn.Module, state: Mapping[str, Any], *, assign: bool) -> None:
    """Raise RuntimeError, in torch's words, where a shape in ``state`` is not the module's. What a module's own code reads
    is left to that."""
    if assign:
        raise RuntimeError(
            "load_state_dict(assign=True) would replace parameters that are sharded by ZeRO stage 3: leave it out"
        )
    hooks = (hook for inner in module.modules() for hook in inner._load_state_dict_pre_hooks.values())
    if any(getattr(hook, "__module__", None) != __name__ for hook in hooks):
        return
    wrong = []
    for path, inner in module.named_modules():
        if type(inner)._load_from_state_dict is not nn.Module._load_from_state_dict:
            continue
        for name, value in [*inner.named_parameters(recurse=False), *inner.named_buffers(recurse=False)]:
            key = f"{path}.{name}" if path else name
            given, own = getattr(state.get(key), "shape", None), shape_of(value)
            if given is not None and given != own and not (tuple(given) == (1,) and not own):
                wrong.append(
                    f"size mismatch for {key}: copying a param with shape {given} from checkpoint, the shape in current "
                    f"model is {own}."
                )
    if wrong:
        raise RuntimeError("\n\t".join([f"Error(s) in loading state_dict for {type(module).__name__}:", *wrong]))
