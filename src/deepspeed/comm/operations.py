"""Operations of several ranks that are under way, and what is said where one does not come about."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..native.hosts import PeerError


class CollectiveError(RuntimeError):
    """An operation of several ranks that did not come about: the message says which, and whom it waited for."""


class Pending(Protocol):
    """An operation under way."""

    def wait(self) -> None:
        """Return when the operation's result is in its buffer. May be called more than once. Raises CollectiveError where
        other ranks do not do their part."""


@dataclass(frozen=True)
class Collective:
    """What the ranks of a group do together, the same on all of them. ``kind`` is the operation, ``purpose`` what it is
    for; ``numel`` and ``dtype`` are those of its buffer, None where it has none."""

    kind: str
    purpose: str
    numel: int | None = None
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        size = "" if self.numel is None else f" of {self.numel} {str(self.dtype).removeprefix('torch.')}"
        return f"the {self.purpose} ({self.kind}{size})" if self.purpose else f"{self.kind}{size}"


class Awaited(NamedTuple):
    """A handle of torch's, and the global rank whose part it waits for (None: any)."""

    work: Any
    peer: int | None = None


class Deferred:
    """Nothing to wait for: ``finish`` runs once, when the result is asked for."""

    def __init__(self, finish: Callable[[], None] | None = None):
        self._finish = finish

    def wait(self) -> None:
        """Run what is left to do."""
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()


DONE: Pending = Deferred()
"""An operation that has nothing to do."""


class Converted:
    """An ``operation`` on ``sent``, ``buffer`` itself or a copy of it in another dtype; its result is put into ``buffer``."""

    def __init__(self, operation: Pending, sent: Tensor, buffer: Tensor):
        self._operation = operation
        self._sent = sent
        self._buffer = buffer

    def wait(self) -> None:
        """Wait for the operation."""
        self._operation.wait()
        if self._sent is not self._buffer:
            self._buffer.copy_(self._sent)


class Started:
    """A ``collective`` whose ``works`` have begun; ``finish`` is given the seconds that it took."""

    def __init__(self, collective: Collective, works: Sequence[Awaited], finish: Callable[[float], None]):
        self._collective = collective
        self._works = works
        self._finish: Callable[[float], None] | None = finish
        self._failure: CollectiveError | None = None
        self._since = time.time()
        self._started = time.perf_counter()

    def wait(self) -> None:
        """Wait for every rank's part."""
        if self._failure is not None:
            raise self._failure
        for work, peer in self._works:
            try:
                work.wait()
            except RuntimeError as error:
                self._failure = CollectiveError(self._account(peer, error))
                raise self._failure from error
        self._works = ()
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish(time.perf_counter() - self._started)

    def _account(self, peer: int | None, error: RuntimeError) -> str:
        return in_vain(self._collective, peer, error, since=self._since)


def in_vain(collective: Collective, peer: int | None, error: BaseException, *, since: float) -> str:
    """What is said of a wait for ``peer`` that ended by ``error``. ``since`` is in seconds since the epoch."""
    if isinstance(error, PeerError):
        peer = error.peer
    whom = "other ranks" if peer is None else f"rank {peer}"
    start = time.strftime("%H:%M:%S", time.localtime(since))
    return (
        f"rank {dist.get_rank()} waited for {whom} in vain in {collective}, for {time.time() - since:.1f} s since {start}: "
        f"{error}. Where the connection was closed, the other rank has ended, and its own error says why. Else it does "
        "something else or takes longer than the process group's timeout: with zero_optimization.enable_sanity_checks set "
        "to true the ranks compare what they are about to do, and the error names the first difference."
    )
