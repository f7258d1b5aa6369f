"""All monitors of a run behind one face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Event, Monitor
from .comet import CometMonitor
from .csv_monitor import csvMonitor
from .tensorboard import TensorBoardMonitor
from .wandb import WandbMonitor

__all__ = ["CometMonitor", "Event", "Monitor", "MonitorMaster", "TensorBoardMonitor", "WandbMonitor", "csvMonitor"]

_KINDS: dict[str, type[TensorBoardMonitor | WandbMonitor | CometMonitor | csvMonitor]] = {
    "tensorboard": TensorBoardMonitor,
    "wandb": WandbMonitor,
    "comet": CometMonitor,
    "csv_monitor": csvMonitor,
}


class MonitorMaster(Monitor):
    """Writes events to every monitor that ``config`` enables (its sections ``tensorboard``, ``wandb``, ``comet`` and
    ``csv_monitor``). Only rank 0 writes; on other ranks nothing is made and ``enabled`` is False.

    Raises ImportError, naming what to install, where the library of an enabled monitor is missing.
    """

    def __init__(self, config: Any, *, rank: int = 0):
        self.monitors: list[Monitor] = []
        try:
            for name, kind in _KINDS.items():
                if rank == 0 and getattr(config, name).enabled:
                    self.monitors.append(kind(config, rank=rank))
        except BaseException:
            self.close()
            raise
        super().__init__(enabled=bool(self.monitors))

    def write_events(self, events: Sequence[Event]) -> None:
        """Write ``events``, tuples of tag, value and step (samples trained), to every monitor."""
        for monitor in self.monitors:
            monitor.write_events(events)

    def close(self) -> None:
        """Close every monitor."""
        while self.monitors:
            self.monitors.pop().close()
        super().close()
