"""What was communicated: one record per operation kind and message size."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Totals of one kind of operation at one message size."""

    count: int = 0
    message_nbytes: int = 0
    wire_nbytes: int = 0
    seconds: float = 0.0

    def add(self, other: Tally) -> None:
        """Count ``other`` in."""
        self.count += other.count
        self.message_nbytes += other.message_nbytes
        self.wire_nbytes += other.wire_nbytes
        self.seconds += other.seconds

    @property
    def bandwidth(self) -> float:
        """Bytes per second that this rank sent, 0 where nothing was timed."""
        return self.wire_nbytes / self.seconds if self.seconds else 0.0


@dataclass(eq=False)
class CommunicationLog:
    """Counts, volumes and times of collectives, by operation and message size in bytes.

    ``message_nbytes`` is the size of the whole buffer that an operation works on; ``wire_nbytes`` is what this rank
    sent. Seconds run from the start of an operation to the end of its wait, overlap included.
    """

    tallies: dict[tuple[str, int], Tally] = field(default_factory=dict)

    def add(self, operation: str, *, message_nbytes: int, wire_nbytes: int, seconds: float) -> None:
        """Count one finished operation."""
        tally = self.tallies.setdefault((operation, message_nbytes), Tally())
        tally.add(Tally(1, message_nbytes, wire_nbytes, seconds))

    def total(self, *operations: str) -> Tally:
        """The sum over all message sizes of the named operations (of all operations, where none is named)."""
        result = Tally()
        for (operation, _), tally in self.tallies.items():
            if not operations or operation in operations:
                result.add(tally)
        return result

    def clear(self) -> None:
        """Start counting anew."""
        self.tallies.clear()

    def table(self, operations: Collection[str] | None = None) -> str:
        """The log as text, one line per operation and message size, largest volume first; of ``operations`` alone
        where given."""
        lines = [f"{'operation':<16}{'message':>12}{'count':>8}{'sent':>12}{'ms each':>10}{'GB/s':>8}"]
        ordered = sorted(self.tallies.items(), key=lambda item: -item[1].message_nbytes)
        for (operation, nbytes), tally in ordered:
            if operations is not None and operation not in operations:
                continue
            each = 1e3 * tally.seconds / tally.count
            lines.append(
                f"{operation:<16}{_size(nbytes):>12}{tally.count:>8}{_size(tally.wire_nbytes):>12}"
                f"{each:>10.2f}{tally.bandwidth / 1e9:>8.2f}"
            )
        return "\n".join(lines)


def merged(logs: Iterable[CommunicationLog]) -> CommunicationLog:
    """The sum of several logs."""
    result = CommunicationLog()
    for log in logs:
        for key, tally in log.tallies.items():
            result.tallies.setdefault(key, Tally()).add(tally)
    return result


_LIVING: weakref.WeakSet[CommunicationLog] = weakref.WeakSet()


def remember(log: CommunicationLog) -> None:
    """Let ``living_logs`` find ``log`` for as long as it is in use."""
    _LIVING.add(log)


def living_logs() -> list[CommunicationLog]:
    """The log of every communicator that is in use in this process."""
    return list(_LIVING)


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"
