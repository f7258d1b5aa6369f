"""The version of the installed distribution."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("deepspeed")
except PackageNotFoundError:
    __version__ = "1.0.0.dev0"
