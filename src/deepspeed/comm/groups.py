"""The groups that ranks form. Today there is one dimension: all ranks are data-parallel, and each sequence is whole on
one rank."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist


def group_name(group: dist.ProcessGroup | None) -> str:
    """The name that all ranks have for ``group`` (the default group where it is None)."""
    return str(actual(group).group_name)


def group_timeout(group: dist.ProcessGroup | None) -> timedelta:
    """How long operations of ``group`` (the default group where it is None) wait for other ranks: as its maker said."""
    for device in actual(group)._device_types:
        options = getattr(actual(group)._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return dist.distributed_c10d.default_pg_timeout


def new_group(partition: Sequence[Sequence[int]], like: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A group of this rank's part of ``partition`` (global ranks), of the same kind as ``like``. Called on all ranks, with
    the same parts."""
    backend, timeout = dist.get_backend(like), group_timeout(like)
    groups = [dist.new_group(list(ranks), backend=backend, timeout=timeout) for ranks in partition]
    return next(g for g, ranks in zip(groups, partition, strict=True) if dist.get_rank() in ranks)


def actual(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """``group``, the default group where it is None."""
    return group or _get_data_parallel_group()


def _get_data_parallel_group() -> dist.ProcessGroup:
    """The ranks that train on different data: all."""
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("there are no process groups yet: call deepspeed.init_distributed() or deepspeed.initialize()")
    return group


def _get_data_parallel_world_size() -> int:
    """The number of ranks that train on different data."""
    return dist.get_world_size(_get_data_parallel_group())


def _get_data_parallel_rank() -> int:
    """This rank among those that train on different data."""
    return dist.get_rank(_get_data_parallel_group())


def _get_sequence_parallel_world_size() -> int:
    """The number of ranks that share one sequence: 1."""
    return 1


def _get_sequence_parallel_rank() -> int:
    """This rank among those that share its sequence: 0."""
    return 0
