"""The groups that ranks form. Today there is one dimension: all ranks are data-parallel, and each sequence is whole on
one rank."""

from __future__ import annotations

import torch.distributed as dist


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
