"""Slices that come by two hops: from the file into this rank's part of a unit's buffer, and from there to all ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..comm.operations import Pending
from ..native.files import FileTransfer


class Hops:
    """Begins each gather when the own slice has been read, at the latest when it is waited for.

    When a read ends differs between ranks, and gathers must begin in one order on all of them: they do in that in which
    they were asked for, a slice that needs no reading behind those that do.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Gather] = deque()

    def start(self, reading: FileTransfer | None, gather: Callable[[], Pending]) -> Pending:
        """Have ``gather`` begun once ``reading`` has ended. All ranks call this in one order."""
        coming = _Gather(self, reading, gather)
        self._waiting.append(coming)
        self.advance()
        return coming

    def advance(self) -> None:
        """Begin to gather what has been read by now. OSError where it could not be read."""
        while self._waiting and self._waiting[0].is_read:
            self._waiting.popleft().begin()

    def advance_to(self, coming: _Gather) -> None:
        """Begin to gather ``coming``, and before it all that was asked for before."""
        while coming in self._waiting:
            self._waiting.popleft().begin()


class _Gather:
    """One gather. Where it could not begin, whoever waits for it hears why."""

    def __init__(self, hops: Hops, reading: FileTransfer | None, gather: Callable[[], Pending]):
        self._hops = hops
        self._reading = reading
        self._gather = gather
        self._pending: Pending | None = None

    @property
    def is_read(self) -> bool:
        return self._reading is None or self._reading.done

    def begin(self) -> Pending:
        if self._reading is not None:
            self._reading.wait()
        self._pending = self._gather()
        return self._pending

    def wait(self) -> None:
        self._hops.advance_to(self)
        (self._pending or self.begin()).wait()
