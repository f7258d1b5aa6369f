"""The documented names of ``deepspeed.utils.groups``."""

from __future__ import annotations

from ..comm.groups import (
    _get_data_parallel_group,
    _get_data_parallel_rank,
    _get_data_parallel_world_size,
    _get_sequence_parallel_rank,
    _get_sequence_parallel_world_size,
)

__all__ = [
    "_get_data_parallel_group",
    "_get_data_parallel_rank",
    "_get_data_parallel_world_size",
    "_get_sequence_parallel_rank",
    "_get_sequence_parallel_world_size",
]
