"""Asynchronous reads and writes of files: tensors in CPU memory to and from a disk, while the program goes on.

::

    queue = FileQueue(QueueOptions(block_size=1 << 20, queue_depth=32))
    file = queue.open("/nvme/states.bin", nbytes=tensor.nbytes)   # room is reserved now
    writing = file.submit_write(tensor, offset=0)
    ...                                                           # the tensor must not change until
    writing.wait()                                                # it is written, or an error says why not

Transfers are cut into blocks that run in parallel, past the page cache (O_DIRECT) where file system and alignment allow it;
what does not fit goes another way by itself. Transfers that overlap in the file are in no order: wait for the first.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import sys
import time
import weakref
from types import TracebackType

import torch
from torch import Tensor

from .file_engine import Backend, Engine, QueueOptions, Running, direct_alignments, make_engine
from .file_errors import Extent, failure, no_room_error, timeout_error
from .file_threads import OpenFile

PUNCH_HOLE = 0x01 | 0x02
"""FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE of fallocate(2)."""

SIGNAL_SECONDS = 0.2
"""How long a wait leaves Python's signal handlers (Ctrl-C) unattended."""


def aligned_empty(numel: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized 1-D CPU tensor whose memory begins at a page, so that O_DIRECT takes it without a copy."""
    nbytes = numel * dtype.itemsize
    if nbytes == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype, count=numel)


class FileQueue:
    """Files whose reads and writes share one queue of requests and its threads.

    ``backend`` is "io_uring", "threads" (of the compiled core) or "python"; without it, the first of these that works here.
    A queue that is garbage, and one that is left at the end of the program, completes what was submitted.
    """

    def __init__(self, options: QueueOptions | None = None, *, backend: Backend | None = None):
        self.options = options or QueueOptions()
        self.backend: Backend
        self._engine, self.backend = make_engine(self.options, backend)
        self._process = os.getpid()
        # What has ended badly stays here until it is waited for; what runs stays, for its tensor must not be freed.
        self._pending: set[FileTransfer] = set()
        self._registered: list[Tensor] = []
        self._end = weakref.finalize(self, _end_in, self._process, self._engine, self._pending, self._registered)

    def open(
        self, path: str | os.PathLike[str], *, nbytes: int | None = None, writable: bool = True, direct: bool = True
    ) -> File:
        """Open the file at ``path``, which is created if it is ``writable`` and missing.

        With ``nbytes`` it gets at least that size, and its room on the disk is reserved: FileTransferError if there is not
        enough. ``direct`` bypasses the page cache where the file system can do that. OSError as ``os.open`` raises it.
        """
        return File(self, os.fspath(path), nbytes=nbytes, writable=writable, direct=direct)

    def register(self, tensor: Tensor) -> bool:
        """Have the kernel pin the memory of ``tensor`` (contiguous, on CPU, at most 1 GiB) once instead of at each transfer;
        for buffers that are used again and again. Whether it did: only io_uring can, within ``ulimit -l``, for 64 tensors.
        The memory is kept until the queue is closed."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"the tensor is on {tensor.device} with strides {tensor.stride()}; pass a contiguous one on cpu")
        done = self._end.alive and self._engine.register_memory(tensor.data_ptr(), tensor.nbytes)
        if done:
            self._registered.append(tensor.detach())
        return done

    def close(self) -> None:
        """Complete what was submitted and end the threads. Raises the error of a transfer that failed and was never
        waited for."""
        if not self._end.alive:
            return
        self._end()
        self._registered.clear()
        failed = [transfer for transfer in self._pending if transfer.done]
        self._pending.clear()
        for transfer in failed:
            transfer.wait()

    def _quiesce(self, file: _Descriptors) -> None:
        """Wait for the transfers that use ``file``."""
        for transfer in [other for other in self._pending if other.uses(file)]:
            transfer.settle()

    def __enter__(self) -> FileQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._end()

    def _submit(self, file: _Descriptors, tensor: Tensor, extent: Extent) -> FileTransfer:
        if os.getpid() != self._process:
            raise RuntimeError(f"{extent}: the queue was made before a fork and has no threads here; make one after it")
        if not self._end.alive:
            raise RuntimeError(f"{extent}: the queue is closed")
        for transfer in [other for other in self._pending if other.succeeded]:
            self._pending.discard(transfer)
        running = self._engine.submit(file.target, tensor.data_ptr(), extent.nbytes, extent.offset, extent.writing)
        transfer = FileTransfer(self._pending, file, tensor, running, extent)
        self._pending.add(transfer)
        return transfer


def _end_in(process: int, engine: Engine, pending: set[FileTransfer], registered: list[Tensor]) -> None:
    """Close the engine, in the process that has its threads; the others keep memory and files alive until then."""
    if os.getpid() == process:
        engine.close()


class _Descriptors:
    """A file that is open; what it is open by is closed when neither a File nor a transfer has it."""

    def __init__(self, path: str, *, nbytes: int | None, writable: bool, direct: bool):
        flags = os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY)
        buffered = os.open(path, flags | (os.O_CREAT if writable else 0), 0o666)
        descriptors = [buffered]
        self.end = weakref.finalize(self, _close_all, descriptors)
        self.target = OpenFile(-1, buffered, 1, 1)
        if nbytes:
            _reserve(path, buffered, nbytes)
        bypass = getattr(os, "O_DIRECT", 0)
        if direct and bypass:
            # Where the file system has no O_DIRECT, the page cache does.
            with contextlib.suppress(OSError):
                descriptors.append(os.open(path, flags | bypass))
                self.target = OpenFile(descriptors[1], buffered, *direct_alignments(descriptors[1]))


def punch_hole(descriptor: int, offset: int, nbytes: int) -> None:
    """Deallocate a part of a file on Linux, where the file system can do that; nothing elsewhere."""
    if sys.platform == "linux" and nbytes:
        libc = ctypes.CDLL(None)
        libc.fallocate64(descriptor, PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(nbytes))


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _reserve(path: str, descriptor: int, nbytes: int) -> None:
    """Give the file at least this size, and its room on the disk."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, nbytes)
        else:
            os.truncate(descriptor, max(nbytes, os.fstat(descriptor).st_size))
    except OSError as error:
        raise no_room_error(Extent(path, 0, nbytes, True), error) from None


class File:
    """An open file of a queue."""

    def __init__(self, queue: FileQueue, path: str, *, nbytes: int | None, writable: bool, direct: bool):
        self.path, self.writable = path, writable
        self._queue = queue
        self._file = _Descriptors(path, nbytes=nbytes, writable=writable, direct=direct)

    @property
    def direct(self) -> bool:
        """Whether aligned transfers bypass the page cache."""
        return self._file.target.direct >= 0

    @property
    def nbytes(self) -> int:
        """The size of the file now, in bytes."""
        return os.fstat(self._file.target.buffered).st_size

    def submit_read(self, tensor: Tensor, offset: int = 0) -> FileTransfer:
        """Begin to fill ``tensor`` (contiguous, in CPU memory, of any dtype) from byte ``offset`` on. TypeError and
        ValueError say what does not fit; what happens to the read later is raised by its ``wait``."""
        return self._submit(tensor, offset, writing=False)

    def submit_write(self, tensor: Tensor, offset: int = 0) -> FileTransfer:
        """Begin to write the bytes of ``tensor`` from byte ``offset`` on; a file that ends before grows. As
        ``submit_read``."""
        return self._submit(tensor, offset, writing=True)

    def reserve(self, nbytes: int) -> None:
        """Give the file at least this size, and its room on the disk. FileTransferError where there is not enough."""
        if nbytes:
            _reserve(self.path, self._file.target.buffered, nbytes)

    def discard(self, offset: int, nbytes: int) -> None:
        """Give the room of these bytes back to the file system where it can take that; then they read as zeros. No transfer
        uses them."""
        punch_hole(self._file.target.buffered, offset, nbytes)

    def close(self) -> None:
        """Wait until no transfer uses the file, then close it. Errors are still raised by the transfers' ``wait``."""
        self._queue._quiesce(self._file)
        self._file.end()

    def __enter__(self) -> File:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _submit(self, tensor: Tensor, offset: int, *, writing: bool) -> FileTransfer:
        extent = Extent(self.path, offset, tensor.nbytes, writing)
        if not self._file.end.alive:
            raise ValueError(f"{extent}: the file is closed")
        if writing and not self.writable:
            raise ValueError(f"{extent}: the file was opened with writable=False")
        if tensor.device.type != "cpu":
            raise TypeError(f"{extent}: the tensor is on {tensor.device}; copy it to or from one in CPU memory")
        if not tensor.is_contiguous():
            raise ValueError(f"{extent}: the tensor has strides {tensor.stride()}; pass one that is contiguous")
        if offset < 0:
            raise ValueError(f"{extent}: the offset is negative")
        return self._queue._submit(self._file, tensor.detach(), extent)


class FileTransfer:
    """A read or write on its way: the tensor belongs to it until it is ``done``."""

    def __init__(self, pending: set[FileTransfer], file: _Descriptors, tensor: Tensor, running: Running, extent: Extent):
        self.extent = extent
        self._pending = pending
        self._running = running
        self._uses: tuple[_Descriptors, Tensor] | None = (file, tensor)  # kept open, and in memory

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._running.wait(0)

    @property
    def succeeded(self) -> bool:
        """Whether all bytes were transferred."""
        return self._running.wait(0) and self._running.outcome()[0] == 0

    def uses(self, file: object) -> bool:
        """Whether it may still read or write ``file``."""
        return self._uses is not None and self._uses[0] is file

    def settle(self, timeout: float | None = None) -> bool:
        """Whether it has ended, well or not, within ``timeout`` seconds; without one it waits for that."""
        begin = time.monotonic()
        left = seconds = math.inf if timeout is None else max(timeout, 0.0)
        while not self._running.wait(min(left, SIGNAL_SECONDS)):
            left = begin + seconds - time.monotonic()
            if left <= 0:
                return False
        self._uses = None
        return True

    def cancel(self) -> None:
        """Begin no further blocks: unless all have begun, ``wait`` raises TransferCancelledError, once those are done."""
        self._running.cancel()

    def wait(self, timeout: float | None = None) -> None:
        """Return when all bytes were transferred. FileTransferError (an OSError) if they were not: ShortFileError where the
        file ends before; TransferTimeoutError after ``timeout`` seconds, and then the transfer goes on."""
        if not self.settle(timeout):
            raise timeout_error(self.extent, timeout or 0.0, self._running.outcome()[2])
        self._pending.discard(self)
        error, failed_at, transferred = self._running.outcome()
        if error:
            raise failure(self.extent, error, failed_at, transferred)
