"""What can go wrong with a read or write of a file: errors that say where, how far it came, and what to do."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

SHORT_FILE = -1
"""The number, beside those of ``errno``, for a file that ends before what is to be read of it."""


@dataclass(frozen=True)
class Extent:
    """Bytes ``[offset, offset + nbytes)`` of the file at ``path``, to be read or written."""

    path: str
    offset: int
    nbytes: int
    writing: bool

    def __str__(self) -> str:
        verb = "writing" if self.writing else "reading"
        return f"{verb} {self.nbytes} bytes at offset {self.offset} of {self.path}"


class FileTransferError(OSError):
    """A read or write that failed: ``path`` (also ``filename``), ``offset``, ``nbytes``, and ``transferred`` bytes of them."""

    def __init__(self, extent: Extent, number: int | None, reason: str, transferred: int):
        super().__init__(number, f"{extent}: {reason}")
        self.filename = self.path = extent.path
        self.offset = extent.offset
        self.nbytes = extent.nbytes
        self.transferred = transferred
        self._given = (extent, number, reason, transferred)

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[type[FileTransferError], tuple[object, ...]]:
        return type(self), self._given


class ShortFileError(FileTransferError):
    """The file ends before what was to be read of it."""


class TransferCancelledError(FileTransferError):
    """The read or write was cancelled before its end."""


class TransferTimeoutError(FileTransferError, TimeoutError):
    """The read or write has not ended in time; it still goes on."""


def timeout_error(extent: Extent, seconds: float, transferred: int) -> TransferTimeoutError:
    """What a wait of ``seconds`` in vain raises."""
    reason = f"{transferred} bytes were transferred in {seconds:g} seconds; it goes on: wait again, or cancel it"
    return TransferTimeoutError(extent, errno.ETIMEDOUT, reason, transferred)


def failure(extent: Extent, number: int, failed_at: int, transferred: int) -> FileTransferError:
    """The error for a transfer that ended with ``number`` (of ``errno``, or SHORT_FILE) at its byte ``failed_at``."""
    moved = f"{transferred} bytes were transferred"
    if number == SHORT_FILE:
        end = extent.offset + failed_at
        return ShortFileError(extent, None, f"the file ends at byte {end}; {moved}: was it truncated?", transferred)
    if number == errno.ECANCELED:
        return TransferCancelledError(extent, number, f"cancelled; {moved}", transferred)
    reason = f"{os.strerror(number)} ({errno.errorcode.get(number, number)}) at byte {extent.offset + failed_at}; {moved}"
    return FileTransferError(extent, number, reason + _advice(extent.path, number), transferred)


def no_room_error(extent: Extent, error: OSError) -> FileTransferError:
    """The error for a file that cannot be given its size."""
    number = error.errno or errno.EIO
    reason = f"{error.strerror} ({errno.errorcode.get(number, number)})"
    return FileTransferError(extent, number, reason + _advice(extent.path, number), 0)


def _advice(path: str, number: int) -> str:
    if number == errno.ENOSPC:
        return f"; {_free(path)}: free some, or choose another directory"
    if number == errno.EDQUOT:
        return "; the quota of this user is used up: free some, or choose another directory"
    if number == errno.EFBIG:
        return "; the file system or the limit of this process (ulimit -f) allows no larger file"
    if number == errno.EIO:
        return "; the device failed: look at the system's log"
    return ""


def _free(path: str) -> str:
    """The free space of the file system that holds ``path``, which may have lost its name."""
    try:
        found = os.statvfs(path if Path(path).exists() else Path(path).parent)
    except OSError:
        return "its free space is unknown"
    return f"its file system has {found.f_bavail * found.f_frsize} bytes free of {found.f_blocks * found.f_frsize}"
