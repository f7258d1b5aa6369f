"""Collectives of one process group on contiguous flat buffers.

A :class:`Communicator` is what code that communicates is handed. It picks the algorithm by the group's backend:

- *gloo* (CPU): reduce-scatter and all-gather are built from point-to-point sends. Gloo's own reduce-scatter moves as
  much as an all-reduce and takes four times as long; its all-gather copies twice. The slices that arrive are summed
  in rank order, so results do not depend on where in a buffer a value lies.
- any other (NCCL): the backend's own collectives, in place.

Each operation returns at once with a handle; the buffer belongs to the operation until ``wait`` has returned.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from .. import native
from ..memory.pool import BufferPool
from .log import CommunicationLog, remember


class Pending(Protocol):
    """An operation under way."""

    def wait(self) -> None:
        """Return when the operation's result is in its buffer. May be called more than once."""


class _Operation:
    """Waits for ``works``, then runs ``finish`` once."""

    def __init__(self, works: Sequence[Any] = (), finish: Callable[[], None] | None = None):
        self._works = works
        self._finish = finish

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works = ()
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()


DONE: Pending = _Operation()
"""An operation that has nothing to do."""


class Communicator:
    """The collectives of ``group`` (the default group where it is None), with their volumes in ``log``."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, log: CommunicationLog | None = None):
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self.log = log if log is not None else CommunicationLog()
        remember(self.log)
        self._scratch = BufferPool()
        self._point_to_point = dist.get_backend(group) == "gloo"
        self._ranks: list[int] = dist.get_process_group_ranks(group)

    def reduce_scatter(
        self, buffer: Tensor, *, out: Tensor | None = None, scale: float = 1.0, accumulate: bool = False
    ) -> Pending:
        """Sum ``buffer`` (1-D, contiguous, a multiple of ``size`` elements) over the ranks, in rank order and with
        fp32 accumulation, times ``scale``.

        This rank's slice of the result goes into ``out``, or with ``accumulate`` is added to it (fp32 then, or fp64
        as the buffer); where ``out`` is None it goes into its place in ``buffer``. The rest of ``buffer`` is undefined
        afterwards.
        """
        if not buffer.numel():
            return DONE
        slices = buffer.chunk(self.size)
        own = slices[self.rank]
        target = own if out is None else out
        finish = functools.partial(_put, own, target, scale, accumulate)
        if self.size == 1:
            return _Operation(finish=finish)
        if not self._point_to_point:
            work = _reduce_scatter_single(own, buffer, self.group)
            return self._logged("reduce_scatter", buffer, 1, _Operation([work], finish))
        arriving = [own if peer == self.rank else self._scratch_like(own) for peer in range(self.size)]
        works = []
        for peer, global_rank in self._peers():
            works.append(dist.irecv(arriving[peer], src=global_rank, group=self.group))
            works.append(dist.isend(slices[peer], dst=global_rank, group=self.group))

        def add_up() -> None:
            native.scaled_sum(arriving, out=target, scale=scale, accumulate=accumulate)
            for tensor in (tensor for tensor in arriving if tensor is not own):
                self._scratch.give_back(tensor)
            arriving.clear()

        return self._logged("reduce_scatter", buffer, 1, _Operation(works, add_up))

    def all_gather(self, buffer: Tensor, *, tag: int = 0) -> Pending:
        """Fill ``buffer`` (1-D, contiguous, a multiple of ``size`` elements) with every rank's slice of its own; this
        rank's slice is already in its place.

        Point-to-point, ranks whose ``tag`` differs wait for each other in vain, where else they would take one buffer
        for another of the same size."""
        if self.size == 1 or not buffer.numel():
            return DONE
        slices = list(buffer.chunk(self.size))
        own = slices[self.rank]
        if not self._point_to_point:
            work = dist.all_gather_into_tensor(buffer, own, group=self.group, async_op=True)
            return self._logged("all_gather", buffer, 1, _Operation([work]))
        works = []
        for peer, global_rank in self._peers():
            works.append(dist.irecv(slices[peer], src=global_rank, group=self.group, tag=tag))
            works.append(dist.isend(own, dst=global_rank, group=self.group, tag=tag))
        return self._logged("all_gather", buffer, 1, _Operation(works))

    def all_reduce(self, buffer: Tensor, *, scale: float = 1.0) -> Pending:
        """Sum ``buffer`` over the ranks in place, times ``scale``."""
        if self.size == 1 or not buffer.numel():
            return _Operation(finish=lambda: _scale(buffer, scale))
        work = dist.all_reduce(buffer, group=self.group, async_op=True)
        return self._logged("all_reduce", buffer, 2, _Operation([work], lambda: _scale(buffer, scale)))

    def broadcast(self, buffer: Tensor, *, source: int = 0) -> Pending:
        """Copy group rank ``source``'s ``buffer`` to all ranks, in place."""
        if self.size == 1 or not buffer.numel():
            return DONE
        work = dist.broadcast(buffer, src=self._ranks[source], group=self.group, async_op=True)
        return self._logged("broadcast", buffer, 1, _Operation([work]))

    def scatter(self, buffer: Tensor | None, out: Tensor, *, source: int = 0) -> Pending:
        """Fill each rank's ``out`` with its slice of group rank ``source``'s ``buffer`` (1-D, contiguous, ``size`` times as
        long as ``out``), which is None on the others."""
        slices = buffer.chunk(self.size) if buffer is not None else []
        if slices:
            out.copy_(slices[self.rank])
        if self.size == 1 or not out.numel():
            return DONE
        if not self._point_to_point:
            work = dist.scatter(out, list(slices) or None, src=self._ranks[source], group=self.group, async_op=True)
            works = [work]
        elif slices:
            works = [dist.isend(slices[peer], dst=global_rank, group=self.group) for peer, global_rank in self._peers()]
        else:
            works = [dist.irecv(out, src=self._ranks[source], group=self.group)]
        return self._logged("scatter", out, 1, _Operation(works))

    def gather_objects(self, value: object) -> list[Any]:
        """Every rank's ``value`` (small and picklable), in rank order. Blocks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum_in_rank_order(self, values: Tensor) -> Tensor:
        """The sum over ranks of a small 1-D tensor, added up in rank order so that every rank has the same bits.
        Blocks."""
        rows = values.new_zeros(self.size, values.numel())
        rows[self.rank] = values
        self.all_gather(rows.view(-1)).wait()
        return rows.sum(0) if self.size <= 2 else _sum_rows(rows)

    def duplicate(self) -> Communicator:
        """The same ranks in a group of their own: its operations need no common order with this one's. Close it when it
        is done with. Called on all ranks."""
        return Communicator(dist.new_group(self._ranks, backend=dist.get_backend(self.group)), log=self.log)

    def close(self) -> None:
        """Take a group that ``duplicate`` made apart; the default group stays."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def barrier(self) -> None:
        """Return when all ranks have come here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def release_scratch(self) -> None:
        """Free the buffers in which reductions received; the next one allocates them anew."""
        self._scratch.release()

    def _scratch_like(self, tensor: Tensor) -> Tensor:
        return self._scratch.take(tensor.numel(), dtype=tensor.dtype, device=tensor.device)

    def _peers(self) -> list[tuple[int, int]]:
        """Group and global ranks of the others, nearest following rank first, so that no rank is everyone's first."""
        order = [(self.rank + step) % self.size for step in range(1, self.size)]
        return [(peer, self._ranks[peer]) for peer in order]

    def _logged(self, name: str, buffer: Tensor, factor: int, operation: _Operation) -> Pending:
        return _Logged(operation, self.log, name, buffer.nbytes, factor * buffer.nbytes * (self.size - 1) // self.size)


class _Logged:
    """An operation that is entered in the log once it has been waited for."""

    def __init__(self, operation: _Operation, log: CommunicationLog, name: str, message: int, wire: int):
        self._operation = operation
        self._log: CommunicationLog | None = log
        self._name = name
        self._nbytes = message, wire
        self._started = time.perf_counter()

    def wait(self) -> None:
        self._operation.wait()
        if self._log is not None:
            message, wire = self._nbytes
            seconds = time.perf_counter() - self._started
            self._log.add(self._name, message_nbytes=message, wire_nbytes=wire, seconds=seconds)
            self._log = None


def _put(own: Tensor, target: Tensor, scale: float, accumulate: bool) -> None:
    _scale(own, scale)
    if accumulate:
        target.add_(own)
    elif target is not own:
        target.copy_(own)


def _scale(tensor: Tensor, scale: float) -> None:
    if scale != 1.0:
        tensor.mul_(scale)


def _sum_rows(rows: Tensor) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def _reduce_scatter_single(own: Tensor, buffer: Tensor, group: dist.ProcessGroup | None) -> Any:
    """The backend's reduce-scatter under the name this torch has for it."""
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return function(own, buffer, group=group, async_op=True)
