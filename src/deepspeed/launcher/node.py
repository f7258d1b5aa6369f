"""Running one node's ranks: start them, watch them, and leave none behind.

The processes are torch elastic's (`torch.distributed.elastic.multiprocessing.start_processes`): each rank in a
session of its own, its streams the launcher's own so that a progress bar stays one. Its agent above them is not
used: on a failure it waits up to 30 seconds for the other ranks and then prints its own account of the error.
Sequence: `run_ranks` starts, `_watch` polls until all have ended, one has failed or a signal asks to stop, and
`_stop` takes down what still runs.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from . import failure

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import PContext, SubprocessContext

POLL_SECONDS = 0.1
SETTLE_SECONDS = 0.5  # after a failure, for the errors that came with it
FAILURE_GRACE_SECONDS = 3.0  # between SIGTERM and SIGKILL for the others of a failed rank
UNWIND_SECONDS = 10.0  # for a rank that has raised, to end
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class RankCommand:
    """What one rank runs: the arguments after the interpreter, and the variables over the launcher's own."""

    rank: int
    arguments: list[str]
    variables: dict[str, str]

    def shell_line(self) -> str:
        """The command as a line for a shell."""
        setting = (f"{key}={value}" for key, value in self.variables.items())
        return shlex.join(["env", *setting, sys.executable, *self.arguments])


@dataclass
class Requests:
    """What asks this node's ranks to stop, and what the other nodes may want to know of it.

    ``signals`` in order of arrival, here or passed on by another node; ``elsewhere`` says what has ended the job on
    another node; ``failed`` is set as soon as a rank here has failed.
    """

    signals: list[int] = field(default_factory=list)
    elsewhere: str = ""
    failed: str = ""

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: note the signal, and let the main loop act on it."""
        self.signals.append(number)


Attendant = Callable[[Requests], AbstractContextManager[object]]
"""Brings requests from elsewhere while ranks run, such as `deepspeed.launcher.launch.listen`."""


@dataclass
class _Watch:
    """What is known of the running ranks, by local rank."""

    context: SubprocessContext
    commands: list[RankCommand]
    folder: Path
    peaks: dict[int, int] = field(default_factory=dict)
    raised_at: dict[int, float] = field(default_factory=dict)

    def exit_codes(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended."""
        codes = {local: handler.proc.poll() for local, handler in self.context.subprocess_handlers.items()}
        return {local: code for local, code in codes.items() if code is not None}

    def sample(self) -> None:
        """Note how much memory each running rank has had at most: it cannot be asked after its end."""
        for local, pid in self.context.pids().items():
            self.peaks[local] = max(self.peaks.get(local, 0), failure.peak_resident_nbytes(pid))

    def error_file(self, local: int) -> Path:
        return Path(self.context.error_files[local])

    def stuck(self, codes: dict[int, int]) -> list[int]:
        """Ranks that have raised an exception but do not end, because a thread or a collective holds them."""
        now = time.monotonic()
        for local in range(len(self.commands)):
            if local not in codes and self.error_file(local).exists():
                self.raised_at.setdefault(local, now)
        return [local for local, at in self.raised_at.items() if local not in codes and now - at > UNWIND_SECONDS]

    def deaths(self, codes: dict[int, int], oom_before: dict[Path, int]) -> list[failure.Death]:
        """The ranks that have failed of themselves, in order of rank."""
        oom_after = failure.oom_kill_counts()
        deaths = []
        for local, command in enumerate(self.commands):
            code, record = codes.get(local), failure.read_error(self.error_file(local))
            if code == 0 or (code is None and record is None):
                continue
            deaths.append(
                failure.Death(
                    rank=command.rank,
                    pid=self.context.pids()[local],
                    exit_code=code,
                    record=record,
                    fault=failure.read_fault(self.error_file(local).parent / "fault.txt"),
                    peak_nbytes=self.peaks.get(local, 0),
                    out_of_memory=failure.oom_killed(code, oom_before, oom_after),
                )
            )
        return deaths


def run_ranks(commands: list[RankCommand], *, host: str, grace_seconds: float, attend: Attendant = nullcontext) -> int:
    """Run the ranks to their end; returns the code that the launcher exits with.

    0 when all ranks return 0; the failed rank's own code (128 + signal number for a signal) when one fails; 130 after
    Ctrl-C and 128 + signal number after SIGTERM or SIGHUP, which are passed on to the ranks; they then have
    ``grace_seconds`` to end before they are killed, less when a second signal comes; 1 when the job has failed on
    another node. ``attend`` brings word of that while the ranks run.
    """
    oom_before = failure.oom_kill_counts()
    with tempfile.TemporaryDirectory(prefix="deepspeed-") as folder, listening() as requests, attend(requests):
        context = _start(commands, folder)
        with listening(requests):  # torch has put its own handlers in place on starting
            watch = _Watch(context, commands, Path(folder))
            try:
                return _watch(watch, requests, oom_before, host, grace_seconds)
            finally:
                _kill_sessions(context)


def _start(commands: list[RankCommand], folder: str) -> SubprocessContext:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    context: PContext = start_processes(
        name="deepspeed",
        entrypoint=sys.executable,
        args={local: tuple(command.arguments) for local, command in enumerate(commands)},
        envs={local: dict(command.variables) for local, command in enumerate(commands)},
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )
    assert isinstance(context, SubprocessContext), "an executable entry point makes a SubprocessContext"
    return context


def say(text: str) -> None:
    """Write to standard error, if anybody still reads it: a lost connection must not keep the ranks from saving."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def listening(requests: Requests | None = None) -> Iterator[Requests]:
    """Note signals instead of dying of them, so that the ranks are always taken down first."""
    requests = requests or Requests()
    previous = {number: signal.signal(number, requests.receive) for number in SIGNALS}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(watch: _Watch, requests: Requests, oom_before: dict[Path, int], host: str, grace_seconds: float) -> int:
    while True:
        watch.sample()
        codes = watch.exit_codes()
        if requests.signals:
            return _interrupted(watch, requests, oom_before, grace_seconds)
        if any(codes.values()) or watch.stuck(codes):
            requests.failed = f"a rank failed on {host}"
            return _failed(watch, oom_before, host)
        if requests.elsewhere:
            say(f"\ndeepspeed: {requests.elsewhere}; stopping the ranks on {host}")
            _stop(watch, signal.SIGTERM, FAILURE_GRACE_SECONDS)
            return 1
        if len(codes) == len(watch.commands):
            return 0
        time.sleep(POLL_SECONDS)


def _failed(watch: _Watch, oom_before: dict[Path, int], host: str) -> int:
    time.sleep(SETTLE_SECONDS)
    codes = watch.exit_codes()
    deaths = watch.deaths(codes, oom_before)
    stopped = [command.rank for local, command in enumerate(watch.commands) if local not in codes]
    say("\n" + failure.report(deaths, stopped, host))
    _stop(watch, signal.SIGTERM, FAILURE_GRACE_SECONDS)
    code = failure.first_cause(deaths).exit_code
    return 1 if code is None else code if code > 0 else 128 - code if code < 0 else 1


def _interrupted(watch: _Watch, requests: Requests, oom_before: dict[Path, int], grace_seconds: float) -> int:
    number = requests.signals[0]
    name = signal.Signals(number).name
    say(f"\ndeepspeed: {name} received; ranks have {grace_seconds:g} s to save and end (again to end them now)")
    _signal_running(watch, number)
    deadline = time.monotonic() + grace_seconds
    while len(codes := watch.exit_codes()) < len(watch.commands):
        if time.monotonic() > deadline or len(requests.signals) > 1 or requests.elsewhere:
            break
        time.sleep(POLL_SECONDS)
    for death in watch.deaths(codes, oom_before):
        if death.record is not None:
            say(f"deepspeed: rank {death.rank} ended with {death.reason}")
    running = [command.rank for local, command in enumerate(watch.commands) if local not in codes]
    if running:
        say(f"deepspeed: killing ranks that still run: {', '.join(map(str, running))}")
        _stop(watch, signal.SIGKILL, FAILURE_GRACE_SECONDS)
    return 128 + number


def _signal_running(watch: _Watch, number: int) -> None:
    """Pass a signal to the ranks themselves, not to their helpers, which they need in order to save."""
    for handler in watch.context.subprocess_handlers.values():
        if handler.proc.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(handler.proc.pid, number)


def _stop(watch: _Watch, number: signal.Signals, seconds: float) -> None:
    """Send ``number`` to what still runs, and SIGKILL to what is left after ``seconds``."""
    _signal_running(watch, number)
    deadline = time.monotonic() + seconds
    while len(watch.exit_codes()) < len(watch.commands) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    _signal_running(watch, signal.SIGKILL)


def _kill_sessions(context: SubprocessContext) -> None:
    """End each rank and whatever it has started and left: a session's process group outlives its leader."""
    for handler in context.subprocess_handlers.values():
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(handler.proc.pid, signal.SIGKILL)
        handler.proc.wait()
