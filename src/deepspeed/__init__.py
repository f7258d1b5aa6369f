"""Train PyTorch models whose states do not fit in one device's memory.

Names are imported when they are first used, so that ``import deepspeed`` costs little.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("deepspeed")
except PackageNotFoundError:
    __version__ = "1.0.0.dev0"

_HOMES = {
    "initialize": "api",
    "add_config_arguments": "api",
    "init_distributed": "comm",
    "get_accelerator": "accelerator",
    "DeepSpeedEngine": "engine.engine",
    "DeepSpeedConfig": "config",
}
__all__ = ["DeepSpeedConfig", "DeepSpeedEngine", "add_config_arguments", "comm", "init_distributed", "initialize"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name == "comm":
        return importlib.import_module(f"{__name__}.comm")
    raise AttributeError(f"module 'deepspeed' has no attribute '{name}'")
