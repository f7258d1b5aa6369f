"""Settings for the length of a test, an ``mpu`` over all ranks, and the bytes that live storages have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import deepspeed
from deepspeed.checkpoint.activations import checkpointing


@contextmanager
def configured(mpu: Any = None, **arguments: Any) -> Iterator[None]:
    """``configure(mpu, **arguments)`` for a while, from the state in which nothing was configured."""
    before = checkpointing._PROCESS.active
    checkpointing._PROCESS.active = checkpointing._Active()
    try:
        if mpu is not None or arguments:
            deepspeed.checkpointing.configure(mpu, **arguments)
        yield
    finally:
        checkpointing._PROCESS.active = before
        deepspeed.checkpointing.get_cuda_rng_tracker().reset()


class AllRanks:
    """An ``mpu`` whose model-parallel group is the default one."""

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_model_parallel_group(self) -> Any:
        return dist.group.WORLD


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that operations within it made and that are alive, wherever they are held; those
    of ``parameters`` are not counted. ``peak`` is the most there were after any operation."""

    def __init__(self, parameters: Iterable[Tensor] = ()):
        super().__init__()
        self._ignored = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for item in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(item, Tensor) and item.untyped_storage()._cdata not in self._ignored:
                storage = item.untyped_storage()
                self._found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.nbytes())
        return result

    def nbytes(self) -> int:
        self._found = {key: found for key, found in self._found.items() if not found[0].expired()}
        return sum(nbytes for _, nbytes in self._found.values())


def gradients(tensors: Iterable[Tensor]) -> list[Tensor | None]:
    """The gradients, taken away from the tensors."""
    found = []
    for tensor in tensors:
        found.append(tensor.grad)
        tensor.grad = None
    return found


def assert_same_bits(found: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert (one is None) == (other is None), f"only one of the tensors {index} is there"
        assert one is None or other is None or torch.equal(one, other), f"the tensors {index} differ"
