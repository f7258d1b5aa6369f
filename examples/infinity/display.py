"""What a step is doing: its layer, the bytes that went to and from the disk, GB/s, and the time left."""

from __future__ import annotations

import psutil
from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class Traffic:
    """The bytes that this process has read from disks and written to them since the object was made."""

    def __init__(self) -> None:
        self._begin = psutil.Process().io_counters()

    @property
    def read(self) -> int:
        """Bytes that were read."""
        return psutil.Process().io_counters().read_bytes - self._begin.read_bytes

    @property
    def written(self) -> int:
        """Bytes that were written."""
        return psutil.Process().io_counters().write_bytes - self._begin.write_bytes


class DiskProgress(Progress):
    """A bar over the bytes that ``steps`` steps move, ``nbytes`` each."""

    def __init__(self, steps: int, nbytes: int, layers: int, console: Console):
        text = TextColumn("{task.description}")
        columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._steps, self._nbytes, self._layers = steps, nbytes, layers
        self._phase, self._done, self._traffic = "", 0, Traffic()
        # The phases move bytes at different rates: guess the time left by the mean of a whole step.
        super().__init__(*columns, console=console, speed_estimate_period=1200)
        self._bar = self.add_task("", total=steps * nbytes)

    def phase(self, name: str, *, step: int) -> None:
        """``step`` (from 0) has come to its part ``name``."""
        if name == "forward":
            self._done, self._traffic = step * self._nbytes, Traffic()
        self._phase = f"step {step + 1}/{self._steps}, {name}"
        self.update(self._bar, description=self._phase)

    def layer(self, index: int) -> None:
        """This layer (from 0) begins."""
        self.update(self._bar, description=f"{self._phase}, layer {index + 1}/{self._layers}")

    def get_renderable(self) -> RenderableType:
        """The bar, with the bytes so far. rich asks for it ten times a second."""
        if self.tasks:
            self.update(self._bar, completed=self._done + self._traffic.read + self._traffic.written)
        return super().get_renderable()
