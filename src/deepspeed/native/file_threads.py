"""Reads and writes of files by Python threads: what the compiled core does, where nothing is compiled."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from .file_errors import SHORT_FILE

MOST_THREADS = 16
"""More Python threads wait for each other rather than for the device."""


class OpenFile(NamedTuple):
    """A file that is open twice: by ``buffered`` and, with O_DIRECT, by ``direct`` (-1 where that is refused), which takes
    only offsets, sizes and memory of these alignments."""

    direct: int
    buffered: int
    offset_alignment: int
    memory_alignment: int


@dataclass(frozen=True)
class Target:
    """The two ends of a transfer: memory, and where in the file it begins."""

    file: OpenFile
    memory: memoryview
    offset: int
    writing: bool

    def move(self, begin: int, end: int) -> int:
        """Move bytes of ``[begin, end)``, as many as one call takes; returns how many."""
        direct, buffered, alignment, _ = self.file
        descriptor, part = buffered, self.memory[begin:end]
        if direct >= 0:
            past = (self.offset + begin) % alignment
            if past:  # up to where O_DIRECT can start
                part = part[: alignment - past]
            elif len(part) >= alignment:
                descriptor, part = direct, part[: len(part) // alignment * alignment]
        call = os.pwritev if self.writing else os.preadv
        try:
            return call(descriptor, [part], self.offset + begin)
        except OSError as error:
            if error.errno != errno.EINVAL or descriptor != direct:
                raise
            return call(buffered, [part], self.offset + begin)


class ThreadedTransfer:
    """A read or write whose blocks are moved by threads that call ``run``."""

    def __init__(self, target: Target, block_size: int):
        self._target, self._block_size = target, block_size
        self._change = threading.Condition()
        self._issued, self._in_flight = 0, 0  # bytes of blocks that threads have taken; blocks that they have now
        self._error, self._failed_at, self._transferred = 0, 0, 0

    def run(self) -> None:
        """Move one block after another until none is left or one has failed."""
        while True:
            with self._change:
                if self._error or self._issued == len(self._target.memory):
                    return
                begin = self._issued
                room = self._block_size - (self._target.offset + begin) % self._block_size
                end = self._issued = min(begin + room, len(self._target.memory))
                self._in_flight += 1
            self._move(begin, end)

    def wait(self, seconds: float) -> bool:
        """Whether it ended within so many seconds; negative: wait forever."""
        with self._change:
            return self._change.wait_for(self._ended, None if seconds < 0 else seconds)

    def cancel(self) -> None:
        """Begin no further blocks."""
        with self._change:
            if not self._ended() and not self._error:
                self._error, self._failed_at = errno.ECANCELED, self._issued
                self._change.notify_all()

    def outcome(self) -> tuple[int, int, int]:
        """As ``file_engine.Running`` says."""
        with self._change:
            return self._error, self._failed_at, self._transferred

    def _ended(self) -> bool:
        return not self._in_flight and (self._error != 0 or self._issued == len(self._target.memory))

    def _move(self, begin: int, end: int) -> None:
        position, error = begin, errno.EIO
        try:
            while position < end:
                moved = self._target.move(position, end)
                if not moved:
                    error = errno.EIO if self._target.writing else SHORT_FILE
                    break
                position += moved
        except OSError as failed:
            error = failed.errno or error
        finally:
            with self._change:
                self._transferred += position - begin
                first = not self._error or (self._error != errno.ECANCELED and position < self._failed_at)
                if position < end and first:
                    self._error, self._failed_at = error, position
                self._in_flight -= 1
                self._change.notify_all()


class ThreadedFileEngine:
    """An engine (see ``file_engine``) of ``requests`` threads, at most MOST_THREADS, each with a block at a time."""

    def __init__(self, block_size: int, requests: int):
        self._block_size = max(block_size, 4096)
        self._threads = min(requests, MOST_THREADS)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="deepspeed-files")

    def submit(self, file: OpenFile, address: int, nbytes: int, offset: int, writing: bool) -> ThreadedTransfer:
        """Begin a transfer. Memory that is not aligned goes through the page cache."""
        block_size = self._block_size - self._block_size % file.offset_alignment
        if address % file.memory_alignment or not block_size:
            file, block_size = file._replace(direct=-1), self._block_size
        memory = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
        transfer = ThreadedTransfer(Target(file, memory, offset, writing), block_size)
        for _ in range(min(self._threads, -(-nbytes // block_size) + 1)):
            self._pool.submit(transfer.run)
        return transfer

    def register_memory(self, address: int, nbytes: int) -> bool:
        """There is nothing to prepare."""
        return False

    def close(self) -> None:
        """Complete what was submitted and end the threads."""
        self._pool.shutdown(wait=True)
