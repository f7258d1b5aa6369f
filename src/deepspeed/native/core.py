"""The compiled core, if this installation has one."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The compiled core and an empty string, or None and why there is none."""
    choice = os.environ.get("DEEPSPEED_NATIVE", "1").lower()
    if choice in ("0", "false", "off"):
        return None, f"the compiled core is switched off by DEEPSPEED_NATIVE={choice}"
    try:
        return importlib.import_module("deepspeed.native._core"), ""
    except ImportError as error:
        if getattr(error, "name", None) == "deepspeed.native._core" and isinstance(error, ModuleNotFoundError):
            return None, "the core was not compiled (install a C++ compiler, then reinstall deepspeed)"
        return None, f"the compiled core does not load ({error}); reinstall deepspeed"
