"""Wall-clock timers: where a training step spends its time, and how many samples per second it trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


def _nothing() -> None:
    """The device is always up to date where operations run synchronously, as on CPU."""


class Timer:
    """A stop watch that can be started many times; it adds up what it measured until it is reset.

    ``synchronize`` waits for the device, so that the clock sees finished work: pass the accelerator's function where
    operations are asynchronous and nothing where they are not.
    """

    def __init__(self, name: str, *, synchronize: Callable[[], None] = _nothing):
        self.name = name
        self.count = 0
        self.seconds = 0.0
        self._synchronize = synchronize
        self._started: float | None = None

    @property
    def running(self) -> bool:
        """Whether the timer was started and not yet stopped."""
        return self._started is not None

    def start(self) -> None:
        """Start measuring. Raises RuntimeError where the timer already runs."""
        if self._started is not None:
            raise RuntimeError(f"timer {self.name!r} was started twice: stop it before starting it again")
        self._synchronize()
        self._started = time.perf_counter()

    def stop(self, *, record: bool = True) -> None:
        """Stop measuring and, unless ``record`` is False, add the time. Raises RuntimeError where it does not run."""
        if self._started is None:
            raise RuntimeError(f"timer {self.name!r} was stopped without having been started")
        self._synchronize()
        seconds, self._started = time.perf_counter() - self._started, None
        if record:
            self.seconds += seconds
            self.count += 1

    def reset(self) -> None:
        """Forget what was measured; a running timer is stopped without recording."""
        self.count = 0
        self.seconds = 0.0
        self._started = None

    def elapsed(self, *, reset: bool = True) -> float:
        """Recorded milliseconds since the last reset. The running interval is not part of it."""
        milliseconds = self.seconds * 1e3
        if reset:
            self.count = 0
            self.seconds = 0.0
        return milliseconds

    def mean(self) -> float:
        """Milliseconds per recorded interval, 0 where there is none."""
        return self.seconds * 1e3 / self.count if self.count else 0.0


class WallClockTimers:
    """Named timers that share one way to synchronize the device: ``timers("forward").start()``."""

    def __init__(self, *, synchronize: Callable[[], None] = _nothing):
        self._synchronize = synchronize
        self._timers: dict[str, Timer] = {}

    def __call__(self, name: str) -> Timer:
        """The timer called ``name``, made at its first use."""
        if name not in self._timers:
            self._timers[name] = Timer(name, synchronize=self._synchronize)
        return self._timers[name]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure the block under ``name``. A block that raises is not recorded."""
        timer = self(name)
        timer.start()
        try:
            yield
        except BaseException:
            timer.stop(record=False)
            raise
        timer.stop()

    def names(self) -> list[str]:
        """The names of all timers, in order of first use."""
        return list(self._timers)

    def elapsed(self, names: Sequence[str] | None = None, *, reset: bool = True) -> dict[str, float]:
        """Milliseconds by name, for those of ``names`` (all where None) that recorded anything."""
        wanted = self.names() if names is None else names
        found = [self._timers[name] for name in wanted if name in self._timers]
        return {timer.name: timer.elapsed(reset=reset) for timer in found if timer.count}

    def line(self, names: Sequence[str] | None = None, *, normalizer: float = 1.0, reset: bool = True) -> str:
        """The line of the log, ``time (ms) | forward: 12.34 | backward: 23.45``; times are divided by ``normalizer``
        (a number of steps). Empty where nothing was recorded."""
        if normalizer <= 0:
            raise ValueError(f"normalizer must be positive, got {normalizer}")
        times = self.elapsed(names, reset=reset)
        if not times:
            return ""
        return " | ".join(["time (ms)", *(f"{name}: {value / normalizer:.2f}" for name, value in times.items())])


class ThroughputTimer:
    """Samples per second over optimizer steps; tokens per second where ``tokens_per_sample`` is known.

    Call ``start`` at the beginning of a step (or micro-step) and ``stop(global_step=True)`` at its end. The first
    ``start_step`` steps are counted but not timed: they contain allocation and warm-up.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        start_step: int = 2,
        tokens_per_sample: int | None = None,
        enabled: bool = True,
        synchronize: Callable[[], None] = _nothing,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 sample per step, got {batch_size}")
        self.batch_size = batch_size
        self.start_step = start_step
        self.tokens_per_sample = tokens_per_sample
        self.enabled = enabled
        self.micro_step_count = 0
        self.global_step_count = 0
        self.total_elapsed_time = 0.0
        self.step_elapsed_time = 0.0
        self._synchronize = synchronize
        self._started: float | None = None
        self._pending = 0.0

    def start(self) -> None:
        """Begin an interval; an interval that already runs goes on."""
        if self.enabled and self._started is None:
            self._synchronize()
            self._started = time.perf_counter()

    def stop(self, global_step: bool = False) -> None:
        """End an interval. ``global_step`` says that an optimizer step is complete with it. Without a ``start``
        only the steps are counted."""
        if not self.enabled:
            return
        self.micro_step_count += 1
        if self._started is not None:
            self._synchronize()
            self._pending += time.perf_counter() - self._started
            self._started = None
        if global_step:
            self.global_step_count += 1
            self.step_elapsed_time, self._pending = self._pending, 0.0
            if self.global_step_count > self.start_step:
                self.total_elapsed_time += self.step_elapsed_time

    def reset(self) -> None:
        """Forget all steps and times."""
        self.micro_step_count = self.global_step_count = 0
        self.total_elapsed_time = self.step_elapsed_time = self._pending = 0.0
        self._started = None

    def avg_samples_per_sec(self) -> float:
        """Mean samples per second over the timed steps, 0 until there is one."""
        steps = self.global_step_count - self.start_step
        if steps < 1 or not self.total_elapsed_time:
            return 0.0
        return steps * self.batch_size / self.total_elapsed_time

    def samples_per_sec(self) -> float:
        """Samples per second of the last complete step, 0 before the first."""
        return self.batch_size / self.step_elapsed_time if self.step_elapsed_time else 0.0

    def tokens_per_sec(self) -> float:
        """Mean tokens per second over the timed steps. Raises ValueError where the tokens of a sample are unknown."""
        if self.tokens_per_sample is None:
            raise ValueError("tokens per second need ThroughputTimer(tokens_per_sample=...), which was not given")
        return self.avg_samples_per_sec() * self.tokens_per_sample
