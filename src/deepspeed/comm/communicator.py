"""Collectives of one process group on contiguous flat buffers.

A :class:`Communicator` is what code that communicates is handed. It picks the algorithm by where the ranks are, and by the
group's backend:

- CPU tensors of ranks of one host go through memory (``host.py``);
- *gloo* (CPU) otherwise: reduce-scatter and all-gather are built from point-to-point sends. Gloo's own reduce-scatter moves as
  much as an all-reduce and takes four times as long; its all-gather copies twice. The slices that arrive are summed
  in rank order, so results do not depend on where in a buffer a value lies.
- any other (NCCL): the backend's own collectives, in place.

Each operation returns at once with a handle; the buffer belongs to the operation until ``wait`` has returned.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .. import native
from ..memory.pool import BufferPool
from ..native.hosts import SUMMED_CODES, HostGroup, Kind, Sum
from .checks import CollectiveChecks
from .groups import group_name, group_timeout, new_group
from .host import gather_objects, host_group
from .log import CommunicationLog, remember
from .operations import DONE, Awaited, Collective, CollectiveError, Deferred, Pending, Started, in_vain


class Communicator:
    """The collectives of ``group`` (the default group where it is None), with their volumes in ``log``.

    The ``purpose`` of an operation is for the errors: what it is, "fetch of unit 'layers.1'". With ``checks``, an
    operation begins when it is waited for, once all ranks have come to the same one. ``partition`` has the global ranks of
    this group and of those that were made with it.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        log: CommunicationLog | None = None,
        checks: CollectiveChecks | None = None,
        partition: Sequence[Sequence[int]] = (),
    ):
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self.log = log if log is not None else CommunicationLog()
        remember(self.log)
        self._scratch = BufferPool()
        self._point_to_point = dist.get_backend(group) == "gloo"
        self._host = host_group(group) if self._point_to_point and self.size > 1 else None
        self._ranks: list[int] = dist.get_process_group_ranks(group)
        self._partition = partition or (self._ranks,)
        self._checks = checks
        self._channel = checks.channel(group_name(group), self._ranks) if checks is not None and self.size > 1 else None

    def reduce_scatter(
        self, buffer: Tensor, *, out: Tensor | None = None, scale: float = 1.0, accumulate: bool = False, purpose: str = ""
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
        put = functools.partial(_put, own, target, scale, accumulate)
        if self.size == 1:
            return Deferred(put)
        if host := self._memory_for(buffer, summed=True):
            total = Sum(target, scale, accumulate)
            return self._run("reduce_scatter", purpose, buffer, 1, lambda: _through(host, Kind.reduce_scatter, buffer, total))
        arriving: list[Tensor] = []

        def exchange() -> list[Awaited]:
            arriving.extend(own if peer == self.rank else self._scratch_like(own) for peer in range(self.size))
            works = []
            for peer, global_rank in self._peers():
                works.append(Awaited(dist.irecv(arriving[peer], src=global_rank, group=self.group), global_rank))
                works.append(Awaited(dist.isend(slices[peer], dst=global_rank, group=self.group), global_rank))
            return works

        def add_up() -> None:
            native.scaled_sum(arriving, out=target, scale=scale, accumulate=accumulate)
            for tensor in (tensor for tensor in arriving if tensor is not own):
                self._scratch.give_back(tensor)
            arriving.clear()

        def reduce() -> list[Awaited]:
            return [Awaited(_reduce_scatter_single(own, buffer, self.group))]

        start, finish = (exchange, add_up) if self._point_to_point else (reduce, put)
        return self._run("reduce_scatter", purpose, buffer, 1, start, finish)

    def all_gather(self, buffer: Tensor, *, tag: int = 0, purpose: str = "") -> Pending:
        """Fill ``buffer`` (1-D, contiguous, a multiple of ``size`` elements) with every rank's slice of its own; this
        rank's slice is already in its place.

        Point-to-point, ranks whose ``tag`` differs wait for each other in vain, where else they would take one buffer
        for another of the same size."""
        if self.size == 1 or not buffer.numel():
            return DONE
        if host := self._memory_for(buffer):
            return self._run("all_gather", purpose, buffer, 1, lambda: _through(host, Kind.all_gather, buffer, tag=tag))
        slices = list(buffer.chunk(self.size))
        own = slices[self.rank]

        def exchange() -> list[Awaited]:
            works = []
            for peer, global_rank in self._peers():
                works.append(Awaited(dist.irecv(slices[peer], src=global_rank, group=self.group, tag=tag), global_rank))
                works.append(Awaited(dist.isend(own, dst=global_rank, group=self.group, tag=tag), global_rank))
            return works

        def gather() -> list[Awaited]:
            return [Awaited(dist.all_gather_into_tensor(buffer, own, group=self.group, async_op=True))]

        return self._run("all_gather", purpose, buffer, 1, exchange if self._point_to_point else gather)

    def all_reduce(self, buffer: Tensor, *, scale: float = 1.0, purpose: str = "") -> Pending:
        """Sum ``buffer`` over the ranks in place, times ``scale``."""
        if self.size == 1 or not buffer.numel():
            return Deferred(lambda: _scale(buffer, scale))
        if host := self._memory_for(buffer, summed=True):
            # Of 16-bit values the sum is rounded before it is scaled, as elsewhere.
            early = scale if buffer.element_size() > 2 else 1.0
            total = Sum(buffer, early)
            begin = functools.partial(_through, host, Kind.all_reduce, buffer, total)
            return self._run("all_reduce", purpose, buffer, 2, begin, lambda: _scale(buffer, scale / early))

        def reduce() -> list[Awaited]:
            return [Awaited(dist.all_reduce(buffer, group=self.group, async_op=True))]

        return self._run("all_reduce", purpose, buffer, 2, reduce, lambda: _scale(buffer, scale))

    def broadcast(self, buffer: Tensor, *, source: int = 0, purpose: str = "") -> Pending:
        """Copy group rank ``source``'s ``buffer`` to all ranks, in place."""
        if self.size == 1 or not buffer.numel():
            return DONE
        if host := self._memory_for(buffer):
            begin = functools.partial(_through, host, Kind.broadcast, buffer, source=source)
            return self._run("broadcast", purpose, buffer, 1, begin)

        def send() -> list[Awaited]:
            return [Awaited(dist.broadcast(buffer, src=self._ranks[source], group=self.group, async_op=True))]

        return self._run("broadcast", purpose, buffer, 1, send)

    def scatter(self, buffer: Tensor | None, out: Tensor, *, source: int = 0, purpose: str = "") -> Pending:
        """Fill each rank's ``out`` with its slice of group rank ``source``'s ``buffer`` (1-D, contiguous, ``size`` times as
        long as ``out``), which is None on the others."""
        slices = list(buffer.chunk(self.size)) if buffer is not None else []
        if slices:
            out.copy_(slices[self.rank])
        if self.size == 1 or not out.numel():
            return DONE
        if host := self._memory_for(out):
            begin = functools.partial(_through, host, Kind.scatter, buffer, out, source=source)
            return self._run("scatter", purpose, out, 1, begin)
        origin = self._ranks[source]

        def exchange() -> list[Awaited]:
            if not slices:
                return [Awaited(dist.irecv(out, src=origin, group=self.group), origin)]
            return [
                Awaited(dist.isend(slices[peer], dst=global_rank, group=self.group), global_rank)
                for peer, global_rank in self._peers()
            ]

        def scatter() -> list[Awaited]:
            return [Awaited(dist.scatter(out, slices or None, src=origin, group=self.group, async_op=True))]

        return self._run("scatter", purpose, out, 1, exchange if self._point_to_point else scatter)

    def all_to_all(self, buffer: Tensor, out: Tensor, *, purpose: str = "") -> Pending:
        """Fill slice i of ``out`` with this rank's slice of rank i's ``buffer``. Both are 1-D, contiguous and of one size, a
        multiple of ``size`` elements."""
        if not buffer.numel():
            return DONE
        slices, filled = buffer.chunk(self.size), out.chunk(self.size)
        filled[self.rank].copy_(slices[self.rank])
        if self.size == 1:
            return DONE
        if host := self._memory_for(buffer):
            return self._run("all_to_all", purpose, buffer, 1, lambda: _through(host, Kind.all_to_all, buffer, out))

        def exchange() -> list[Awaited]:
            works = []
            for peer, global_rank in self._peers():
                works.append(Awaited(dist.irecv(filled[peer], src=global_rank, group=self.group), global_rank))
                works.append(Awaited(dist.isend(slices[peer], dst=global_rank, group=self.group), global_rank))
            return works

        def send() -> list[Awaited]:
            return [Awaited(dist.all_to_all_single(out, buffer, group=self.group, async_op=True))]

        return self._run("all_to_all", purpose, buffer, 1, exchange if self._point_to_point else send)

    def gather_objects(self, value: object, *, purpose: str = "") -> list[Any]:
        """Every rank's ``value`` (small and picklable), in rank order. Blocks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size

        def gather() -> None:
            if self._host is not None:
                values[:] = gather_objects(self._host, value, rank=self.rank, size=self.size)
            else:
                dist.all_gather_object(values, value, group=self.group)

        self._block("gather_objects", purpose, gather)
        return values

    def sum_in_rank_order(self, values: Tensor, *, purpose: str = "") -> Tensor:
        """The sum over ranks of a small 1-D tensor, added up in rank order so that every rank has the same bits.
        Blocks."""
        rows = values.new_zeros(self.size, values.numel())
        rows[self.rank] = values
        self.all_gather(rows.view(-1), purpose=purpose).wait()
        return rows.sum(0) if self.size <= 2 else _sum_rows(rows)

    def checked(self) -> Communicator:
        """The same ranks, which from now on compare what they are about to do before each operation. Called on all
        ranks."""
        store = dist.distributed_c10d._get_default_store()
        name, rank = group_name(self.group), dist.get_rank()
        scope = f"collective_checks/{name}/{store.add(f'collective_checks/{name}/{rank}', 1)}"
        checks = CollectiveChecks(store, scope, rank=rank, ranks=self._ranks, timeout=group_timeout(self.group))
        return Communicator(self.group, log=self.log, checks=checks)

    def duplicate(self) -> Communicator:
        """The same ranks in a group of their own: its operations need no common order with this one's. Close it when it
        is done with. Called on all ranks."""
        group = new_group(self._partition, self.group)
        return Communicator(group, log=self.log, checks=self._checks, partition=self._partition)

    def split(self, parts: Sequence[Sequence[int]]) -> Communicator:
        """This rank's one of ``parts``, which are disjoint and together all of this group's ranks. Called on all ranks."""
        partition = [[self._ranks[rank] for rank in part] for part in parts]
        return Communicator(new_group(partition, self.group), log=self.log, checks=self._checks, partition=partition)

    def unchecked(self) -> Communicator:
        """The same ranks, which compare no more: a rank that still does is told that this one has left."""
        if self._checks is None:
            return self
        self._checks.close()
        return Communicator(self.group, log=self.log, partition=self._partition)

    def close(self) -> None:
        """Take a group that ``duplicate`` made apart; the default group stays. This rank does nothing more in it."""
        if self._host is not None and self.group is not None:
            self._host.close()
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def barrier(self) -> None:
        """Return when all ranks have come here."""
        if self.size > 1:
            host = self._host

            def meet() -> None:
                if host is not None:
                    host.begin(Kind.barrier).wait()
                else:
                    dist.barrier(group=self.group)

            self._block("barrier", "", meet)

    def release_scratch(self) -> None:
        """Free the buffers in which reductions received; the next one allocates them anew."""
        self._scratch.release()

    def _run(
        self,
        kind: str,
        purpose: str,
        buffer: Tensor,
        factor: int,
        start: Callable[[], Sequence[Awaited]],
        finish: Callable[[], None] | None = None,
    ) -> Pending:
        """Begin an operation on ``buffer``, or announce it. Once it has been waited for, it is entered in the log."""
        collective = Collective(kind, purpose, buffer.numel(), buffer.dtype)
        nbytes = buffer.nbytes

        def end(seconds: float) -> None:
            if finish is not None:
                finish()
            wire = factor * nbytes * (self.size - 1) // self.size
            self.log.add(kind, message_nbytes=nbytes, wire_nbytes=wire, seconds=seconds)

        def begin() -> Started:
            return Started(collective, start(), end)

        return begin() if self._channel is None else self._channel.announce(collective, begin)

    def _block(self, kind: str, purpose: str, call: Callable[[], object]) -> None:
        """Run an operation that blocks."""
        collective = Collective(kind, purpose)

        def begin() -> Pending:
            since = time.time()
            try:
                call()
            except RuntimeError as error:
                raise CollectiveError(in_vain(collective, None, error, since=since)) from error
            return DONE

        operation = begin() if self._channel is None else self._channel.announce(collective, begin)
        operation.wait()

    def _memory_for(self, tensor: Tensor, *, summed: bool = False) -> HostGroup | None:
        """The collectives through memory, where they take ``tensor``."""
        takes = tensor.device.type == "cpu" and (not summed or tensor.dtype in SUMMED_CODES)
        return self._host if takes else None

    def _scratch_like(self, tensor: Tensor) -> Tensor:
        return self._scratch.take(tensor.numel(), dtype=tensor.dtype, device=tensor.device)

    def _peers(self) -> list[tuple[int, int]]:
        """Group and global ranks of the others, nearest following rank first, so that no rank is everyone's first."""
        order = [(self.rank + step) % self.size for step in range(1, self.size)]
        return [(peer, self._ranks[peer]) for peer in order]


def _through(
    host: HostGroup, kind: Kind, buffer: Tensor | None, out: Tensor | Sum | None = None, *, tag: int = 0, source: int = 0
) -> list[Awaited]:
    return [Awaited(host.begin(kind, buffer, out, tag=tag, source=source))]


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
