"""Reading and writing tensors from and to a file, beside computing."""

from __future__ import annotations

import ctypes
import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

ALIGNMENT = 4096
"""Bytes to which places in a file are aligned."""


def _memory(tensor: Tensor) -> memoryview:
    # Not tensor.numpy(), after which torch never resizes the storage again.
    return memoryview((ctypes.c_char * tensor.numel()).from_address(tensor.data_ptr())).cast("B")


class Request:
    """A read or write that is under way."""

    def __init__(self, future: Future[None]):
        self._future = future

    def wait(self) -> None:
        """Return when it is complete. Raises OSError where it failed."""
        self._future.result()


class ScratchFile:
    """A file without a name in ``folder``, which grows as places are allocated in it."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._pool = ThreadPoolExecutor(2)
        self.nbytes = 0

    def allocate(self, nbytes: int) -> int:
        """The offset of a new place of ``nbytes``."""
        offset = self.nbytes
        self.nbytes += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return offset

    def submit_read(self, target: Tensor, offset: int) -> Request:
        """Begin to fill ``target`` (1-D, uint8, contiguous, on the CPU) from ``offset`` on."""
        return Request(self._pool.submit(self._read, _memory(target), offset))

    def submit_write(self, source: Tensor, offset: int) -> Request:
        """Begin to write ``source`` (1-D, uint8, contiguous, on the CPU) at ``offset``."""
        return Request(self._pool.submit(self._write, _memory(source), offset))

    def close(self) -> None:
        """Give the file up."""
        self._pool.shutdown()
        self._file.close()

    def _read(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            done += os.preadv(self._file.fileno(), [view[done:]], offset + done)

    def _write(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done:], offset + done)
