"""The ranks that compute with the same activations, as an ``mpu`` object of a script knows them."""

from __future__ import annotations

from typing import Any, Protocol

import torch.distributed as dist

from ...comm.communicator import Communicator


class ModelParallelUnit(Protocol):
    """What is asked of an ``mpu``, as Megatron-LM's is one."""

    def get_model_parallel_rank(self) -> int:
        """This rank within its model-parallel group."""

    def get_model_parallel_world_size(self) -> int:
        """The number of ranks in that group."""

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """That group; None is the default group, of all ranks."""


def check_model_parallel(mpu: Any) -> ModelParallelUnit:
    """``mpu``. Raises TypeError where it lacks a method."""
    names = [f"get_model_parallel_{what}" for what in ("rank", "world_size", "group")]
    missing = [name for name in names if not callable(getattr(mpu, name, None))]
    if missing:
        raise TypeError(
            f"mpu_ is an object with the methods {', '.join(names)}; {mpu!r} has no {', '.join(missing)}. "
            "Without model parallelism give None"
        )
    return mpu


def model_parallel_communicator(mpu: ModelParallelUnit | None) -> Communicator | None:
    """Collectives among the model-parallel ranks, None where a rank is the only one of its group. Raises ValueError where
    the group is another than rank and world size say."""
    if mpu is None or mpu.get_model_parallel_world_size() == 1:
        return None
    communicator = Communicator(mpu.get_model_parallel_group())
    said = mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()
    if said != (communicator.rank, communicator.size):
        raise ValueError(
            f"mpu_ says that this is model-parallel rank {said[0]} of {said[1]}, but in its model-parallel group it is "
            f"rank {communicator.rank} of {communicator.size}: its three methods must speak of one group"
        )
    return communicator
