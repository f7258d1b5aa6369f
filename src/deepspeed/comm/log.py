"""What was communicated: one record per operation kind and message size."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Tally:
    """Totals of one kind of operation at one message size."""

    count: int = 0
    message_nbytes: int = 0
    wire_nbytes: int = 0
    seconds: float = 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes per second that this rank sent, 0 where nothing was timed."""
        return self.wire_nbytes / self.seconds if self.seconds else 0.0


@dataclass
class CommunicationLog:
    """Counts, volumes and times of collectives, by operation and message size in bytes.

    ``message_nbytes`` is the size of the whole buffer that an operation works on; ``wire_nbytes`` is what this rank
    sent. Seconds run from the start of an operation to the end of its wait, overlap included.
    """

    tallies: dict[tuple[str, int], Tally] = field(default_factory=dict)

    def add(self, operation: str, *, message_nbytes: int, wire_nbytes: int, seconds: float) -> None:
        """Count one finished operation."""
        tally = self.tallies.setdefault((operation, message_nbytes), Tally())
        tally.count += 1
        tally.message_nbytes += message_nbytes
        tally.wire_nbytes += wire_nbytes
        tally.seconds += seconds

    def total(self, *operations: str) -> Tally:
        """The sum over all message sizes of the named operations (of all operations, where none is named)."""
        result = Tally()
        for (operation, _), tally in self.tallies.items():
            if not operations or operation in operations:
                result.count += tally.count
                result.message_nbytes += tally.message_nbytes
                result.wire_nbytes += tally.wire_nbytes
                result.seconds += tally.seconds
        return result

    def clear(self) -> None:
        """Start counting anew."""
        self.tallies.clear()

    def table(self) -> str:
        """The log as text, one line per operation and message size, largest volume first."""
        lines = [f"{'operation':<16}{'message':>12}{'count':>8}{'sent':>12}{'ms each':>10}{'GB/s':>8}"]
        ordered = sorted(self.tallies.items(), key=lambda item: -item[1].message_nbytes)
        for (operation, nbytes), tally in ordered:
            each = 1e3 * tally.seconds / tally.count
            lines.append(
                f"{operation:<16}{_size(nbytes):>12}{tally.count:>8}{_size(tally.wire_nbytes):>12}"
                f"{each:>10.2f}{tally.bandwidth / 1e9:>8.2f}"
            )
        return "\n".join(lines)


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"
