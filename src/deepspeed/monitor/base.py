"""What all monitors share: the event, the interface and the import of a library that may be missing."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

Event = tuple[str, float, int]
"""``(tag, value, step)``: the step is by convention the number of samples trained so far."""


class Monitor(ABC):
    """A place where events are written. One that is not ``enabled`` accepts events and drops them."""

    def __init__(self, *, enabled: bool):
        self.enabled = enabled

    @abstractmethod
    def write_events(self, events: Sequence[Event]) -> None:
        """Write ``events``, in order."""

    def close(self) -> None:
        """Write out what is buffered and let go of the destination. Closing twice is harmless."""
        self.enabled = False


def import_library(module: str, *, section: str, extra: str) -> Any:
    """Import ``module``. Raises ImportError that names the configuration section that asked for it and what to install
    where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{section}.enabled is true, but {module!r} cannot be imported ({error}): "
            f"run `pip install deepspeed[{extra}]`, or set {section}.enabled to false"
        ) from error


def section_of(config: Any, name: str) -> Any:
    """Section ``name`` of ``config``, or ``config`` itself where it is that section already."""
    return getattr(config, name, config)
