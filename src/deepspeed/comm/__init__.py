"""Process groups and collectives: torch.distributed where it serves, and communicators over flat buffers."""

from __future__ import annotations

import atexit
import importlib
import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import (
    ReduceOp,
    all_gather,
    all_gather_into_tensor,
    all_gather_object,
    all_reduce,
    all_to_all,
    all_to_all_single,
    barrier,
    broadcast,
    broadcast_object_list,
    destroy_process_group,
    gather,
    get_backend,
    get_global_rank,
    get_rank,
    get_world_size,
    irecv,
    is_initialized,
    isend,
    new_group,
    recv,
    reduce,
    reduce_scatter,
    scatter,
    send,
)

from ..accelerator import get_accelerator
from ..logs import logger
from .log import living_logs, merged

__all__ = [
    "ReduceOp",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "destroy_process_group",
    "gather",
    "get_backend",
    "get_global_rank",
    "get_local_rank",
    "get_rank",
    "get_world_size",
    "init_distributed",
    "irecv",
    "is_initialized",
    "isend",
    "log_summary",
    "new_group",
    "recv",
    "reduce",
    "reduce_scatter",
    "scatter",
    "send",
]


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta = timedelta(minutes=30),
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    **kwargs: Any,
) -> None:
    """Make the default process group, unless there is one. With ``dist_init_required`` False there has to be one, else it
    is an error.

    Ranks come from the launcher's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); without it the process is
    the only rank. ``dist_backend`` None is nccl where there are CUDA devices, gloo elsewhere. The group ends with the
    program.
    """
    if dist.is_initialized():
        return
    if dist_init_required is False:
        raise RuntimeError("there is no process group, and init_distributed(dist_init_required=False) makes none")
    # The defaults of this module's functions are the default group as it is when the module is imported. torch.optim
    # imports it: later than here, the defaults would keep the group and its threads alive after `_leave`.
    importlib.import_module("torch.distributed.nn")
    atexit.register(_leave)
    backend = dist_backend or get_accelerator().communication_backend_name()
    if "RANK" not in os.environ and init_method is None:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    os.environ.setdefault("MASTER_PORT", str(distributed_port))
    dist.init_process_group(backend, init_method=init_method, timeout=timeout, **kwargs)


def log_summary() -> None:
    """Log, on rank 0, what it has communicated so far: count, volume, time and bandwidth by operation and message
    size. The engine's own collectives are counted; those that a program calls itself are not."""
    if not is_initialized() or get_rank() == 0:
        logger.info("communication so far\n%s", merged(living_logs()).table())


def _leave() -> None:
    """End the process groups while the interpreter still stands: a gloo thread that frees its last tensors later cannot
    take the interpreter's lock any more, and aborts the finished program."""
    if dist.is_initialized():
        dist.destroy_process_group()


def get_local_rank() -> int:
    """This process's rank on its machine, 0 where no launcher has said."""
    return dist.get_node_local_rank(fallback_rank=0)
