"""Events as CSV files: one per tag."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import Event, Monitor, section_of

DEFAULT_OUTPUT_PATH = "runs/csv"


class csvMonitor(Monitor):
    """Appends every event to ``output_path/job_name/TAG.csv``, a row ``step,value`` under the header ``step,TAG``.

    Characters of a tag that file names do not bear (``/`` above all) become ``_``; tags that differ only in these
    share no file: the second raises ValueError. Rows are on disk when ``write_events`` returns, and a later run
    appends to the same files.
    """

    def __init__(self, config: Any, *, rank: int = 0):
        section = section_of(config, "csv_monitor")
        super().__init__(enabled=section.enabled and rank == 0)
        self.directory = Path(section.output_path or DEFAULT_OUTPUT_PATH) / section.job_name
        self._tags: dict[Path, str] = {}
        if self.enabled:
            self.directory.mkdir(parents=True, exist_ok=True)

    def write_events(self, events: Sequence[Event]) -> None:
        """Append a row for each event."""
        if not self.enabled:
            return
        rows: dict[Path, list[tuple[int, float]]] = {}
        for tag, value, step in events:
            rows.setdefault(self._path(tag), []).append((step, float(value)))
        for path, added in rows.items():
            new = not path.exists() or path.stat().st_size == 0
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                if new:
                    writer.writerow(("step", self._tags[path]))
                writer.writerows(added)

    def _path(self, tag: str) -> Path:
        path = self.directory / (re.sub(r"[^\w.\-]+", "_", tag).strip("_") + ".csv")
        known = self._tags.setdefault(path, tag)
        if known != tag:
            raise ValueError(f"tags {known!r} and {tag!r} would share the file {path}: rename one of them")
        return path
