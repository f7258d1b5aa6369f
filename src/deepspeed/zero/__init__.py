"""ZeRO: parameters, gradients and optimizer states sharded over data-parallel ranks."""

from __future__ import annotations

from .external import register_external_parameter, unregister_external_parameter
from .gathered import GatheredParameters
from .init import Init
from .released import ZeroParamStatus
from .tiling import TiledLinear

__all__ = [
    "GatheredParameters",
    "Init",
    "TiledLinear",
    "ZeroParamStatus",
    "register_external_parameter",
    "unregister_external_parameter",
]
