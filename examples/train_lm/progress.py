"""What a run shows while it trains, and how it is asked to stop."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import deepspeed


def mean_over_ranks(value: float | torch.Tensor) -> float:
    """The mean of every rank's ``value`` (one number). Called on all ranks."""
    total = torch.as_tensor(value, dtype=torch.float32, device=deepspeed.get_accelerator().current_device_name())
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


class TrainingProgress:
    """A progress bar; after each step it shows the loss, tokens per second, learning rate and memory of a rank."""

    COLUMNS = ("loss {task.fields[loss]:.3f}", "{task.fields[speed]:.0f} tokens/s", "lr {task.fields[rate]:.1e}")

    def __init__(self, engine: deepspeed.DeepSpeedEngine, goal: int, console: Console):
        columns = [TextColumn(column) for column in (*self.COLUMNS, "{task.fields[memory]:.0f} MB/rank")]
        step = TextColumn("step {task.completed}/{task.total}")
        self._engine = engine
        self._bar = Progress(step, BarColumn(), *columns, TimeRemainingColumn(), console=console)
        fields = {"loss": float("nan"), "speed": 0.0, "rate": engine.get_lr()[0], "memory": 0.0}
        self._task = self._bar.add_task("train", total=goal, completed=engine.global_steps, **fields)
        self._since = time.perf_counter()

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        self.resume()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def resume(self) -> None:
        """The time since the last step was spent on something else: it does not count."""
        self._since = time.perf_counter()

    def step(self, loss: float) -> None:
        """A step has ended with this loss. Called on all ranks."""
        now = time.perf_counter()
        tokens = self._engine.train_batch_size() * self._engine.module.context
        self._bar.update(
            self._task,
            completed=self._engine.global_steps,
            loss=loss,
            speed=tokens / (now - self._since),
            rate=self._engine.get_lr()[0],
            memory=mean_over_ranks(deepspeed.get_accelerator().memory_allocated() / 1e6),
        )
        self._since = now


class StopRequest:
    """While this context is open, Ctrl-C and SIGTERM do not end the program but ask it to stop after the step."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def on_any_rank(self) -> bool:
        """Whether some rank was asked: the same answer on all ranks, which all must ask for it."""
        return mean_over_ranks(float(self._asked)) > 0
