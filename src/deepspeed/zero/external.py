"""Parameters that a module computes with although they are another module's.

Stage 3 finds out by itself: a parameter that is touched while it is released joins the needs of the module that runs.
Registering it says so beforehand, so that it is fetched with the module's own.
"""

from __future__ import annotations

from collections.abc import Collection
from weakref import WeakKeyDictionary

from torch import nn

_EXTERNAL: WeakKeyDictionary[nn.Module, dict[int, nn.Parameter]] = WeakKeyDictionary()


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Say that ``module``'s forward uses ``parameter``, which is another module's. Raises TypeError for anything else
    than a module and a parameter."""
    _EXTERNAL.setdefault(_checked(module, parameter), {})[id(parameter)] = parameter


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Take back ``register_external_parameter``. Raises ValueError where there was none."""
    if _EXTERNAL.get(_checked(module, parameter), {}).pop(id(parameter), None) is None:
        raise ValueError(f"the parameter was not registered as external to this {type(module).__name__}")


def external_parameters(module: nn.Module) -> Collection[nn.Parameter]:
    """The parameters that were registered as external to ``module``."""
    return _EXTERNAL.get(module, {}).values()


def _checked(module: nn.Module, parameter: nn.Parameter) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"expected a torch.nn.Parameter, got {type(parameter).__name__}")
    return module
