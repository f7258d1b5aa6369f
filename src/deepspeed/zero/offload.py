"""Stage 3's hooks on a model, by the names under which libraries take them off while they generate.

A library that generates many tokens gathers all parameters once, takes the hooks off for the time, and has them put back::

    with GatheredParameters(model.parameters()):
        for hook in offload.forward_hooks + offload.backward_hooks:
            hook.remove()
        offload.forward_hooks = offload.backward_hooks = []
        ...
        offload._register_deepspeed_module(offload.module)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .external import external_parameters
from .scopes import ModuleScopes


@dataclass(frozen=True)
class HookedModel:
    """The parameters that the hooks of ``model`` fetch."""

    model: nn.Module

    def named_parameters(self, recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of ``model``."""
        return self.model.named_parameters(recurse=recurse)

    def ds_external_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that were registered as external to ``model`` itself, by number."""
        return ((str(index), parameter) for index, parameter in enumerate(external_parameters(self.model)))


class DeepSpeedZeRoOffload:
    """The hooks by which ``scopes`` makes the units of ``model`` whole: ``forward_hooks``, which see to backward as well."""

    def __init__(self, model: nn.Module, scopes: ModuleScopes):
        self.module = HookedModel(model)
        self.forward_hooks: list[Any] = list(scopes.hooks)
        self.backward_hooks: list[Any] = []
        self._scopes = scopes

    def _register_deepspeed_module(self, module: HookedModel) -> None:
        """Put the hooks back onto ``module``, which is ``self.module``."""
        if module is not self.module:
            raise ValueError("only the module that these hooks belong to can have them back: pass .module")
        self._scopes.attach()
        self.forward_hooks = list(self._scopes.hooks)
