"""The ds_config.json schema: reading, validating, and the values that are in effect."""

from __future__ import annotations

from .errors import ConfigError
from .load import load_config
from .root import DeepSpeedConfig

__all__ = ["ConfigError", "DeepSpeedConfig", "load_config"]
