"""Train PyTorch models whose states do not fit in one device's memory.

Names are imported when they are first used, so that ``import deepspeed`` costs little.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from . import accelerator, checkpoint, comm, monitor, ops, profiling, runtime, utils, zero
    from .accelerator import get_accelerator
    from .accelerator.placement import OnDevice
    from .api import add_config_arguments, initialize
    from .checkpoint.activations import checkpointing
    from .comm import init_distributed
    from .config import DeepSpeedConfig
    from .engine.engine import DeepSpeedEngine

__all__ = [
    "DeepSpeedConfig",
    "DeepSpeedEngine",
    "OnDevice",
    "__version__",
    "accelerator",
    "add_config_arguments",
    "checkpoint",
    "checkpointing",
    "comm",
    "get_accelerator",
    "init_distributed",
    "initialize",
    "monitor",
    "ops",
    "profiling",
    "runtime",
    "utils",
    "zero",
]

_HOMES = {
    "DeepSpeedConfig": "config",
    "DeepSpeedEngine": "engine.engine",
    "OnDevice": "accelerator.placement",
    "add_config_arguments": "api",
    "get_accelerator": "accelerator",
    "init_distributed": "comm",
    "initialize": "api",
}
"""The modules that public names come from; the other names in ``__all__`` are modules themselves."""

_MODULES = {"checkpointing": "checkpoint.activations.checkpointing"}
"""The modules that lie elsewhere than their public names say."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}")
    raise AttributeError(f"module 'deepspeed' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
