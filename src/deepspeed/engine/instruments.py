"""What is measured while an engine trains, and the lines that say so in the log.

Every measurement is one that the configuration asks for; what it does not ask for costs nothing. Rank 0 writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

from ..accelerator import get_accelerator
from ..comm.communicator import Communicator
from ..config import DeepSpeedConfig
from ..logs import logger
from ..monitor.base import Event
from ..profiling.flops import FlopsProfiler
from ..profiling.memory import memory_line
from ..profiling.wall_clock import ThroughputTimer, WallClockTimers
from .information import EngineInformation

BREAKDOWN = ("forward", "backward", "reduce", "step")
"""The parts of a step that ``wall_clock_breakdown`` times. ``reduce`` is what of the gradients' reduction did not
overlap with backward."""


class Instruments:
    """Timers, profiler and reports of one engine.

    The engine calls ``begin`` before each training forward, ``timed`` around each part and ``end`` after each
    micro-step; ``report`` writes what is due at a step.
    """

    def __init__(self, config: DeepSpeedConfig, communicator: Communicator):
        self._config = config
        self._communicator = communicator
        synchronize = get_accelerator().synchronize
        self.timers = WallClockTimers(synchronize=synchronize)
        throughput = config.timers.throughput
        # Waiting for the device costs speed: done only where somebody reads the result in the log.
        waits = throughput.synchronized and math.isfinite(config.steps_per_print or math.inf)
        self.throughput = ThroughputTimer(
            config.train_batch_size, enabled=throughput.enabled, synchronize=synchronize if waits else lambda: None
        )
        self._profiler: FlopsProfiler | None = None

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Measure the block as part ``name`` of a step."""
        return self.timers.timed(name) if self._config.wall_clock_breakdown else nullcontext()

    def begin(self, engine: EngineInformation) -> None:
        """A training forward of ``engine`` is about to start."""
        self.throughput.start()
        options = self._config.flops_profiler
        due = options.enabled and engine.global_steps == options.profile_step
        if due and self._profiler is None and self._communicator.rank == 0:
            self._profiler = FlopsProfiler(engine.module, engine)
            self._profiler.start_profile()

    def end(self, *, boundary: bool) -> None:
        """A micro-step is over; with ``boundary`` an optimizer step is."""
        self.throughput.stop(global_step=boundary)
        if boundary and self._profiler is not None:
            options = self._config.flops_profiler
            self._profiler.stop_profile()
            self._profiler.print_model_profile(
                profile_step=options.profile_step,
                module_depth=options.module_depth,
                top_modules=options.top_modules,
                detailed=options.detailed,
                output_file=options.output_file,
            )
            self._stop_profiling()

    def report(self, global_steps: int, progress: Callable[[], str]) -> None:
        """Log ``progress()`` where ``steps_per_print`` says so, and the breakdowns that are on: as often, or at every
        step where ``steps_per_print`` names no interval."""
        if self._communicator.rank != 0:
            return
        every = self._config.steps_per_print or math.inf
        if global_steps % every == 0:
            rate = self.throughput.avg_samples_per_sec()
            logger.info("%s%s", progress(), f", samples/s={rate:.2f}" if rate else "")
        interval = int(every) if math.isfinite(every) else 1
        if global_steps % interval == 0:
            for line in self._breakdowns(interval):
                logger.info("%s", line)

    def _breakdowns(self, steps: int) -> Iterator[str]:
        if self._config.wall_clock_breakdown:
            yield self.timers.line(BREAKDOWN, normalizer=steps)
        if self._config.memory_breakdown:
            yield memory_line("memory")
        if self._config.comms_logger.enabled and self._config.comms_logger.verbose:
            yield self._communication()

    def close(self) -> None:
        """Take the profiler off the module; log the table of collectives where ``comms_logger`` is on."""
        self._stop_profiling()
        if self._config.comms_logger.enabled and self._communicator.rank == 0:
            logger.info("%s", self._communication())

    def _stop_profiling(self) -> None:
        if self._profiler is not None:
            self._profiler.end_profile()
            self._profiler = None

    def _communication(self) -> str:
        options = self._config.comms_logger
        shown = None if options.prof_all else options.prof_ops
        return f"communication of rank {self._communicator.rank} so far\n{self._communicator.log.table(shown)}"


def training_events(engine: EngineInformation, loss: float) -> list[Event]:
    """What monitors are told of an optimizer step of ``engine`` whose mean loss is ``loss``."""
    samples = engine.counters.global_samples
    events = [("Train/Samples/train_loss", loss, samples), ("Train/Samples/lr", engine.get_lr()[0], samples)]
    if engine.optimizer is not None and engine.fp16_enabled():
        events.append(("Train/Samples/loss_scale", engine.optimizer.loss_scale, samples))
    return events
