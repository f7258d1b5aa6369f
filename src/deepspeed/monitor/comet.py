"""Events for Comet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Event, Monitor, import_library, section_of

_START_OPTIONS = ("api_key", "project", "workspace", "experiment_key", "mode", "online")


class CometMonitor(Monitor):
    """Logs metrics to one experiment. Raises ImportError where comet_ml is not installed.

    Of each tag one value is logged per ``samples_log_interval`` samples; the first value always is.
    """

    def __init__(self, config: Any, *, rank: int = 0):
        section = section_of(config, "comet")
        super().__init__(enabled=section.enabled and rank == 0)
        self.experiment: Any = None
        self._interval = section.samples_log_interval
        self._logged: dict[str, int] = {}
        if self.enabled:
            library = import_library("comet_ml", section="comet", extra="comet")
            given = {name: getattr(section, name) for name in _START_OPTIONS}
            options = {name: value for name, value in given.items() if value is not None}
            self.experiment = library.start(**options)
            if section.experiment_name is not None:
                self.experiment.set_name(section.experiment_name)

    def write_events(self, events: Sequence[Event]) -> None:
        """Log the events that are due."""
        if not self.enabled:
            return
        for tag, value, step in events:
            last = self._logged.get(tag)
            if last is None or step - last >= self._interval or step < last:
                self._logged[tag] = step
                self.experiment.log_metric(tag, value, step=step)

    def close(self) -> None:
        """End the experiment."""
        if self.experiment is not None:
            self.experiment.end()
            self.experiment = None
        super().close()
