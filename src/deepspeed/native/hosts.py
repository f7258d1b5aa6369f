"""Collectives among the ranks of one host through memory that they share: the Python face of the core's.

The core takes addresses and trusts them: here tensors are checked, kept alive while an operation is under way, and what went
wrong is put into words. Operations run in the order in which they were begun, which is the same on all ranks.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .core import load
from .kernels import DTYPE_CODES

SUMMED_CODES = {**DTYPE_CODES, torch.float64: 3}
"""The dtypes of which the core makes sums, by their number in ``csrc/kernels.hpp``."""

SLOTS = 4
SLOTS_NBYTES = 4 << 20
"""Bytes of all slots of the ranks together, for up to 16 ranks: with what is copied they stay in the processor's cache."""

LEAST_SLOT_NBYTES = 64 << 10

NAMES = tuple(sorted({str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}))
"""Dtypes by their number in what ranks tell each other."""

INTERRUPTIBLE_SECONDS = 1.0
"""A wait looks after so long whether the program was interrupted."""


class Kind(enum.IntEnum):
    """The collectives, by their number in ``csrc/host_group.hpp``."""

    barrier = 0
    broadcast = 1
    scatter = 2
    all_gather = 3
    all_to_all = 4
    reduce_scatter = 5
    all_reduce = 6


class _State(enum.IntEnum):
    waiting = 0
    done = 1
    ended = 2
    left = 3
    timeout = 4
    differs = 5
    closed = 6


class PeerError(RuntimeError):
    """Another rank did not do its part: ``peer``, None where it is not known which."""

    def __init__(self, message: str, peer: int | None):
        super().__init__(message)
        self.peer = peer


@dataclass(frozen=True)
class Place:
    """Where the memory of a group is found: a descriptor of a process, and a number that is in the memory."""

    pid: int
    descriptor: int
    token: int


@dataclass(frozen=True)
class Sum:
    """What is summed and where it goes: ``out`` is this rank's slice, or the buffer itself, in its dtype or in fp32."""

    out: Tensor
    scale: float = 1.0
    accumulate: bool = False


def slot_nbytes(ranks: int) -> int:
    """The size of a slot of which each rank has ``SLOTS``."""
    return max(SLOTS_NBYTES // (ranks * SLOTS) // 4096 * 4096, LEAST_SLOT_NBYTES)


class SharedMemory:
    """The memory of a group of ``ranks``: a new one, or where ``place`` is given, the one that is there. Raises OSError,
    with what does not work here, and RuntimeError without the compiled core."""

    def __init__(self, ranks: int, place: Place | None = None):
        shape = (ranks, SLOTS, slot_nbytes(ranks))
        core = _core()
        if place is None:
            self.segment = core.Segment(*shape)
        else:
            self.segment = core.Segment.attach(*shape, place.pid, place.descriptor, place.token)

    def place(self, pid: int) -> Place:
        """Where the others find it: ``pid`` is this process, which made it."""
        return Place(pid, self.segment.descriptor, self.segment.token)

    def hide(self) -> None:
        """All have found it: nobody else shall."""
        self.segment.close_descriptor()


class HostGroup:
    """The part of ``rank`` in the collectives of ``ranks``, which are the processes ``pids``. A wait of longer than
    ``timeout`` is an error. Raises OSError where a process has ended, or the kernel does not tell."""

    def __init__(self, memory: SharedMemory, rank: int, ranks: Sequence[int], pids: Sequence[int], timeout: timedelta):
        self._ranks = tuple(ranks)
        self._core = _core().HostGroup(memory.segment, self._ranks.index(rank), list(pids), timeout.total_seconds())
        self._in_flight: dict[Any, tuple[Tensor, ...]] = {}
        # First of all: the memory of what is under way goes after it.
        self._finalizer = weakref.finalize(self, self._core.close)

    def begin(
        self, kind: Kind, buffer: Tensor | None = None, out: Tensor | Sum | None = None, *, tag: int = 0, source: int = 0
    ) -> HostOperation:
        """Begin an operation on ``buffer``, contiguous and on the CPU, of as many equal slices as there are ranks where the
        kind has slices. The kinds that sum take a Sum, scatter and all_to_all the tensor to fill; a scatter's ``buffer`` is
        None but on its source."""
        total = out if isinstance(out, Sum) else None
        target = out.out if isinstance(out, Sum) else out
        for tensor in (buffer, target):
            if tensor is not None and not (tensor.is_contiguous() and tensor.device.type == "cpu"):
                raise ValueError(f"{kind.name} takes contiguous CPU tensors, got strides {tensor.stride()} on {tensor.device}")
        named, times = (target, len(self._ranks)) if kind == Kind.scatter else (buffer, 1)
        nbytes, code = (0, 0) if named is None else (times * named.nbytes, NAMES.index(str(named.dtype)))
        operation = self._core.submit(
            kind,
            (0 if buffer is None else buffer.data_ptr(), nbytes, code),
            (
                0 if target is None else target.data_ptr(),
                0 if total is None or buffer is None else SUMMED_CODES[buffer.dtype],
                0 if total is None else SUMMED_CODES[total.out.dtype],
            ),
            1.0 if total is None else total.scale,
            False if total is None else total.accumulate,
            tag,
            source,
        )
        # Handles may be dropped before the operation has ended.
        for other in [other for other in self._in_flight if other.state != _State.waiting]:
            del self._in_flight[other]
        self._in_flight[operation] = tuple(tensor for tensor in (buffer, target) if tensor is not None)
        return HostOperation(self, operation)

    def wait(self, operation: Any) -> None:
        """Return when this rank has the result of ``operation``, one of the core's. Raises PeerError where another rank does
        not do its part."""
        while not self._core.wait(operation, INTERRUPTIBLE_SECONDS):
            pass
        self._in_flight.pop(operation, None)
        if operation.state != _State.done:
            peer = None if operation.peer < 0 else self._ranks[operation.peer]
            raise PeerError(_reason(operation), peer)

    def close(self) -> None:
        """Fail what is under way, and tell the others that this rank has left."""
        self._finalizer()
        self._in_flight.clear()


class HostOperation:
    """A collective under way."""

    def __init__(self, group: HostGroup, operation: Any):
        self._group = group
        self._operation = operation

    def wait(self) -> None:
        """Return when this rank has its result. Raises PeerError where another does not do its part."""
        self._group.wait(self._operation)


def _reason(operation: Any) -> str:
    if operation.state == _State.differs:
        kind, dtype, nbytes, tag = operation.there
        what = f"{Kind(kind).name} of {nbytes} bytes of {NAMES[dtype].removeprefix('torch.')} under tag {tag}"
        return f"it came to another operation, {what}"
    return {
        _State.ended: "its process has ended",
        _State.left: "it has left the group",
        _State.timeout: "Timed out, it did not come",
        _State.closed: "the group was closed here",
    }[_State(operation.state)]


def _core() -> ModuleType:
    core, reason = load()
    if core is None:
        raise RuntimeError(reason)
    return core
