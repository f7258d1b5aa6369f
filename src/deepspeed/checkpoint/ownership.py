"""Whose a directory is, as long as the process lives: what a process that was killed left behind is nobody's."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class Claim:
    """A lock of ``directory`` (none where it is None), which ends with the process."""

    def __init__(self, directory: Path | None):
        self._descriptor = None if directory is None else os.open(directory, os.O_RDONLY)
        if self._descriptor is not None:
            _lock(self._descriptor)

    @property
    def held(self) -> bool:
        """Whether there is one."""
        return self._descriptor is not None

    def release(self) -> None:
        """End it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def abandoned(directory: Path) -> bool:
    """Whether nobody has a claim on ``directory``. On a file system without locks nobody has."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether nobody else has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
