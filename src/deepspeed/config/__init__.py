"""The ds_config.json schema: reading, validating, and the values that are in effect."""

from __future__ import annotations

from .errors import ConfigError
from .load import DeepSpeedConfig, load_config

__all__ = ["ConfigError", "DeepSpeedConfig", "load_config"]
