"""Events for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import Event, Monitor, import_library, section_of

DEFAULT_OUTPUT_PATH = "runs/tensorboard"


class TensorBoardMonitor(Monitor):
    """Writes event files into ``output_path/job_name``. Raises ImportError where tensorboard is not installed."""

    def __init__(self, config: Any, *, rank: int = 0):
        section = section_of(config, "tensorboard")
        super().__init__(enabled=section.enabled and rank == 0)
        self.directory = Path(section.output_path or DEFAULT_OUTPUT_PATH) / section.job_name
        self.summary_writer: Any = None
        if self.enabled:
            library = import_library("torch.utils.tensorboard", section="tensorboard", extra="tensorboard")
            self.summary_writer = library.SummaryWriter(log_dir=str(self.directory))

    def write_events(self, events: Sequence[Event]) -> None:
        """Write scalars and flush them."""
        if not self.enabled:
            return
        for tag, value, step in events:
            self.summary_writer.add_scalar(tag, value, step)
        self.summary_writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self.summary_writer is not None:
            self.summary_writer.close()
            self.summary_writer = None
        super().close()
