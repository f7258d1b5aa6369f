"""File I/O under the documented names: ``AsyncIOBuilder().load().aio_handle(...)``, over a ``FileQueue``."""

from __future__ import annotations

import os
from types import SimpleNamespace

import torch
from torch import Tensor

from .file_engine import QueueOptions
from .files import FileQueue, FileTransfer, aligned_empty


class AioHandle:
    """Reads whole tensors from files, and writes them, by name.

    Functions that begin with ``async`` return 0 at once; ``wait`` returns how many such transfers it has completed. The others
    return 1 when they are done. Where the original returns a negative number, FileTransferError says what went wrong.
    """

    def __init__(
        self,
        block_size: int = 1 << 20,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
    ):
        self._options = QueueOptions(block_size, queue_depth, intra_op_parallelism, single_submit, overlap_events)
        self._queue = FileQueue(self._options)
        self._transfers: list[FileTransfer] = []

    def get_block_size(self) -> int:
        """Bytes of a request."""
        return self._options.block_size

    def get_queue_depth(self) -> int:
        """Requests of one thread in flight."""
        return self._options.queue_depth

    def get_single_submit(self) -> bool:
        """Whether the kernel is told of requests one by one."""
        return self._options.single_submit

    def get_overlap_events(self) -> bool:
        """Whether requests begin as earlier ones end."""
        return self._options.overlap_events

    def get_intra_op_parallelism(self) -> int:
        """Threads that submit requests."""
        return self._options.thread_count

    def sync_pread(self, buffer: Tensor, filename: str | os.PathLike[str], file_offset: int = 0) -> int:
        """Fill ``buffer`` from byte ``file_offset`` of the file on."""
        self._read(buffer, filename, file_offset).wait()
        return 1

    def sync_pwrite(self, buffer: Tensor, filename: str | os.PathLike[str], file_offset: int = 0) -> int:
        """Write ``buffer`` to byte ``file_offset`` of the file on; a file that is missing is created."""
        self._write(buffer, filename, file_offset).wait()
        return 1

    def async_pread(self, buffer: Tensor, filename: str | os.PathLike[str], file_offset: int = 0) -> int:
        """Begin what ``sync_pread`` does."""
        self._transfers.append(self._read(buffer, filename, file_offset))
        return 0

    def async_pwrite(self, buffer: Tensor, filename: str | os.PathLike[str], file_offset: int = 0) -> int:
        """Begin what ``sync_pwrite`` does."""
        self._transfers.append(self._write(buffer, filename, file_offset))
        return 0

    def wait(self) -> int:
        """Complete what was begun and return how many transfers that were."""
        transfers, self._transfers = self._transfers, []
        for transfer in transfers:
            transfer.wait()
        return len(transfers)

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: Tensor) -> Tensor:
        """An uninitialized 1-D CPU tensor of the example's dtype that transfers without a copy."""
        return aligned_empty(num_elem, example_tensor.dtype)

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        """True: memory is freed when nothing refers to the tensor any more."""
        return isinstance(tensor, torch.Tensor)

    def _read(self, buffer: Tensor, filename: str | os.PathLike[str], offset: int) -> FileTransfer:
        return self._queue.open(filename, writable=False).submit_read(buffer, offset)

    def _write(self, buffer: Tensor, filename: str | os.PathLike[str], offset: int) -> FileTransfer:
        return self._queue.open(filename).submit_write(buffer, offset)


class AsyncIOBuilder:
    """Stands for the file I/O that other implementations compile when it is first used; here there is nothing to build."""

    NAME = "async_io"

    def is_compatible(self, verbose: bool = False) -> bool:
        """True: without the compiled core, Python threads do the work."""
        return True

    def load(self, verbose: bool = False) -> SimpleNamespace:
        """What has ``aio_handle``."""
        return SimpleNamespace(aio_handle=AioHandle)


COMPATIBLE_OPS = {AsyncIOBuilder.NAME: True}
"""Whether the operation of a builder works here, by the builder's name."""
