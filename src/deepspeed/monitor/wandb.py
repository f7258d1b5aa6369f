"""Events for Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Event, Monitor, import_library, section_of


class WandbMonitor(Monitor):
    """Logs to one run of ``project``, owned by ``team``. Raises ImportError where wandb is not installed."""

    def __init__(self, config: Any, *, rank: int = 0):
        section = section_of(config, "wandb")
        super().__init__(enabled=section.enabled and rank == 0)
        self.run: Any = None
        if self.enabled:
            library = import_library("wandb", section="wandb", extra="wandb")
            self.run = library.init(project=section.project, group=section.group, entity=section.team)

    def write_events(self, events: Sequence[Event]) -> None:
        """Log the events of each step together: W&B drops values of a step that is already complete."""
        if not self.enabled:
            return
        by_step: dict[int, dict[str, float]] = {}
        for tag, value, step in events:
            by_step.setdefault(step, {})[tag] = value
        for step in sorted(by_step):
            self.run.log(by_step[step], step=step)

    def close(self) -> None:
        """Finish the run."""
        if self.run is not None:
            self.run.finish()
            self.run = None
        super().close()
