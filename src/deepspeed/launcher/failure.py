"""Why a rank ended: its own error, a signal, or the kernel for want of memory, and how that is told."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PROCESS = Path("/proc")

_HIGH_WATER = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)
_OOM_KILLS = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
_FAULT_LINES = 40


@dataclass(frozen=True)
class ErrorRecord:
    """What a rank wrote about the exception that ended it."""

    summary: str
    traceback: str
    time: float


@dataclass(frozen=True)
class Death:
    """A rank that ended early. ``exit_code`` is negative for a signal; ``peak_nbytes`` its resident set's high water."""

    rank: int
    pid: int
    exit_code: int | None
    record: ErrorRecord | None
    fault: str
    peak_nbytes: int
    out_of_memory: bool

    @property
    def reason(self) -> str:
        """Why the rank ended, in one line."""
        if self.out_of_memory:
            return "killed by the kernel: out of memory (SIGKILL, and the kernel's count of such kills has risen)"
        if self.record is not None:
            return self.record.summary
        if self.exit_code is None:
            return "did not end"
        if self.exit_code < 0:
            return f"killed by {signal_name(-self.exit_code)}"
        return f"ended with exit code {self.exit_code}"


def signal_name(number: int) -> str:
    """``SIGSEGV (Segmentation fault)`` for 11."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    description = signal.strsignal(number)
    return f"{name} ({description})" if description else name


def read_error(path: Path) -> ErrorRecord | None:
    """The error record at ``path``, by our worker or by torch's ``record`` decorator; None where there is none."""
    try:
        message = json.loads(path.read_text())["message"]
        if isinstance(message, str):
            return ErrorRecord(message.splitlines()[0], message, path.stat().st_mtime)
        extra = message["extraInfo"]
        return ErrorRecord(message["message"], extra["py_callstack"], float(extra.get("time", path.stat().st_mtime)))
    except (OSError, ValueError, KeyError, IndexError):
        return None


def read_fault(path: Path) -> str:
    """The Python stack that a crash in native code left at ``path``; empty where there is none."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[:_FAULT_LINES])
    except OSError:
        return ""


def peak_resident_nbytes(pid: int) -> int:
    """The most bytes that process ``pid`` has had resident; 0 where the system does not tell."""
    try:
        match = _HIGH_WATER.search((PROCESS / str(pid) / "status").read_text())
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def oom_kill_counts() -> dict[Path, int]:
    """The kernel's counters of out-of-memory kills that concern this process: its control groups' and the machine's."""
    counts: dict[Path, int] = {}
    for path in (*_counter_files(), PROCESS / "vmstat"):
        try:
            match = _OOM_KILLS.search(path.read_text())
        except OSError:
            continue
        if match:
            counts[path] = int(match[1])
    return counts


def _counter_files() -> list[Path]:
    """memory.events (cgroup v2) or memory.oom_control (v1) of this process, as seen inside or outside a container."""
    files = [CGROUPS / "memory.events"]
    try:
        lines = (PROCESS / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return files
    for line in lines:
        _, controllers, place = line.split(":", 2)
        place = place.lstrip("/")
        if not controllers:
            files.append(CGROUPS / place / "memory.events")
        elif "memory" in controllers.split(","):
            files += [CGROUPS / "memory" / place / "memory.oom_control", CGROUPS / "memory" / "memory.oom_control"]
    return list(dict.fromkeys(files))


def oom_killed(exit_code: int | None, before: Mapping[Path, int], after: Mapping[Path, int]) -> bool:
    """Whether a rank's end was an out-of-memory kill: SIGKILL while one of the kernel's counters rose."""
    risen = any(count > before.get(path, count) for path, count in after.items())
    return exit_code == -signal.SIGKILL and risen


def first_cause(deaths: list[Death]) -> Death:
    """The death that led to the others: a kill or crash first, then the earliest error.

    A rank whose peer is killed raises a connection error a moment later, before the kill itself may be noticed.
    """
    crashed = [death for death in deaths if death.exit_code is not None and death.exit_code < 0]
    if crashed:
        return next((death for death in crashed if death.out_of_memory), crashed[0])
    recorded = [death for death in deaths if death.record is not None]
    if recorded:
        return min(recorded, key=lambda death: death.record.time if death.record else 0.0)
    return deaths[0]


def report(deaths: list[Death], stopped: list[int], host: str) -> str:
    """The launcher's account of a failure: the first rank's traceback, then why, then what became of the others."""
    first = first_cause(deaths)
    lines = []
    if first.record is not None:
        lines.append(first.record.traceback.rstrip())
    elif first.fault:
        lines.append(first.fault.rstrip())
    lines.append(f"deepspeed: rank {first.rank} failed on {host} (process {first.pid}): {first.reason}")
    if first.peak_nbytes:
        lines.append(f"deepspeed: its peak resident memory was at least {first.peak_nbytes / 1e6:.0f} MB")
    if first.out_of_memory:
        lines.append("deepspeed: use a higher ZeRO stage, offload, smaller batches or fewer ranks on this machine")
    elif first.record is None and not first.fault:
        lines.append("deepspeed: what it wrote before it ended is above")
    lines += [f"deepspeed: then rank {death.rank}: {death.reason}" for death in deaths if death is not first]
    if stopped:
        lines.append(f"deepspeed: stopped rank{'s' if len(stopped) > 1 else ''} {', '.join(map(str, stopped))}")
    return "\n".join(lines)
