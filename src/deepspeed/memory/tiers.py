"""The tier below memory: a file that holds the memory of tensors while nobody computes with them.

The nouns:

- *evictable*: one storage, and its place in the file. Its memory is freed and allocated again, never replaced: all tensors
  that are views of it stay what they are, and optimizer states keep their keys.
- *chunk*: the evictables that are needed together, such as a slice's master and moments. It is *held* while somebody
  computes with it; what is not held is in the file.

Reading and writing go on beside computing: ``start_...`` returns at once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..native.file_engine import QueueOptions
from ..native.files import File, FileQueue, FileTransfer

ALIGNMENT = 4096
"""Bytes to which places in a file are aligned: disks write whole blocks."""


def whole_blocks(nbytes: int) -> int:
    """What ``nbytes`` take in a file."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Residence(Enum):
    """Where the bytes of an evictable are."""

    MEMORY = "in memory; the file has an older state of them, or none"
    LEAVING = "in memory, and on their way to the file"
    FILE = "in the file; the storage is empty"
    COMING = "in the file, and on their way to memory"


class Evictable:
    """The memory of ``storage``, whose place in the file begins at ``offset`` (bytes)."""

    def __init__(self, storage: torch.UntypedStorage, file: File, offset: int):
        self.residence = Residence.MEMORY
        self.nbytes = storage.nbytes()
        self._storage = storage
        self._file = file
        self._offset = offset
        self._transfer: FileTransfer | None = None

    def start_fetch(self) -> None:
        """Begin to read the bytes, where they are not in memory."""
        if self.residence is Residence.LEAVING:
            self._await()
            self.residence = Residence.MEMORY
        if self.residence is Residence.FILE:
            self._storage.resize_(self.nbytes)
            self._transfer = self._file.submit_read(self._bytes(), self._offset)
            self.residence = Residence.COMING

    def fetch(self) -> None:
        """Have the bytes in memory."""
        self.start_fetch()
        if self.residence is Residence.COMING:
            self._finish()

    def claim(self) -> None:
        """Have memory for bytes that are about to be overwritten: nothing is read."""
        self._finish()
        if self.residence is Residence.FILE:
            self._storage.resize_(self.nbytes)
            self.residence = Residence.MEMORY

    def start_evict(self) -> None:
        """Begin to write the bytes."""
        if self.residence is Residence.COMING:
            self._finish()
        if self.residence is Residence.MEMORY:
            self._transfer = self._file.submit_write(self._bytes(), self._offset)
            self.residence = Residence.LEAVING

    def evict(self) -> None:
        """Have the bytes in the file alone."""
        self.start_evict()
        self._finish()

    def drop(self) -> None:
        """Free the memory of bytes that are as they were read."""
        self._finish()
        if self.residence is Residence.MEMORY:
            self._free()

    def give_up(self) -> None:
        """Leave the place in the file, which goes back to the file system; bytes that were there alone are lost."""
        with suppress(OSError):
            self._finish()
        self._file.discard(self._offset, self.nbytes)

    def start_copy(self, target: Tensor) -> FileTransfer | None:
        """Begin to copy the bytes to ``target``, of the same size; None where they are there already."""
        if self.residence is Residence.COMING:
            self._finish()
        if self.residence is Residence.FILE:
            return self._file.submit_read(target.view(torch.uint8), self._offset)
        target.view(torch.uint8).copy_(self._bytes())
        return None

    def _finish(self) -> None:
        """End what is under way."""
        self._await()
        if self.residence is Residence.COMING:
            self.residence = Residence.MEMORY
        elif self.residence is Residence.LEAVING:
            self._free()

    def _await(self) -> None:
        """End a transfer. Where it failed, the bytes are where they were before: nothing is lost."""
        transfer, self._transfer = self._transfer, None
        if transfer is None:
            return
        try:
            transfer.wait()
        except OSError:
            if self.residence is Residence.COMING:
                self._free()
            else:
                self.residence = Residence.MEMORY
            raise

    def _free(self) -> None:
        self._storage.resize_(0)
        self.residence = Residence.FILE

    def _bytes(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8).set_(self._storage)


class FileTier:
    """A file without a name in the directory ``folder``: it is gone when this process is, however that ends. ``options`` are
    those of its queue. OSError where no file can be made there."""

    def __init__(self, folder: Path, options: QueueOptions | None = None):
        self.folder = folder
        self.nbytes = 0
        self._known: dict[int, Evictable] = {}
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(prefix="deepspeed-", suffix=".states", dir=folder)
        try:
            self._file = FileQueue(options).open(path)
        finally:
            os.close(descriptor)
            Path(path).unlink()

    def evictable(self, tensor: Tensor) -> Evictable:
        """The evictable that is the memory of ``tensor``."""
        storage = tensor.untyped_storage()
        key = id_of(storage)
        if key not in self._known:
            self._known[key] = Evictable(storage, self._file, self.nbytes)
            self.nbytes += whole_blocks(storage.nbytes())
        return self._known[key]

    def reserve(self, nbytes: int) -> None:
        """Have room on the disk for so many bytes more than have a place now. FileTransferError where it has not."""
        self._file.reserve(self.nbytes + nbytes)

    def forget(self, tensor: Tensor) -> None:
        """Give up the place of ``tensor`` in the file: it is needed no more, or stays in memory from now on."""
        evictable = self._known.pop(id_of(tensor.untyped_storage()), None)
        if evictable is not None:
            evictable.give_up()


def id_of(storage: torch.UntypedStorage) -> int:
    """The same number for all views of a storage, whether or not it has memory."""
    return storage._cdata


class Movable(Protocol):
    """What a chunk moves: an evictable, or what does the same by other means."""

    def start_fetch(self) -> None:
        """Begin to have the values in memory."""

    def fetch(self) -> None:
        """Have the values in memory."""

    def claim(self) -> None:
        """Have memory for values that are about to be overwritten."""

    def start_evict(self) -> None:
        """Begin to move the values away."""

    def evict(self) -> None:
        """Have the values away."""

    def drop(self) -> None:
        """Free the memory of values that are as they were fetched."""


class Chunk:
    """The evictables that ``sources`` return: which these are may change while the chunk is in memory."""

    def __init__(self) -> None:
        self._sources: list[Callable[[], Iterable[Movable]]] = []
        self._holders = 0
        self._changed = False

    def include(self, source: Callable[[], Iterable[Movable]]) -> None:
        """Move what ``source`` returns, too."""
        self._sources.append(source)

    def evictables(self) -> list[Movable]:
        """Those that there are now."""
        found = {id(evictable): evictable for source in self._sources for evictable in source()}
        return list(found.values())

    def start_fetch(self, *, save: Evictable | None = None) -> None:
        """Begin to read what is not in memory, ``save`` one."""
        for evictable in self.evictables():
            if evictable is not save:
                evictable.start_fetch()

    def fetch(self, *, save: Evictable | None = None) -> None:
        """Have all in memory, ``save`` one whose bytes are to be overwritten: it has memory, and is not read."""
        self.start_fetch(save=save)
        for evictable in self.evictables():
            evictable.claim() if evictable is save else evictable.fetch()

    def claim(self) -> None:
        """Have memory for all, to be overwritten."""
        for evictable in self.evictables():
            evictable.claim()

    def start_evict(self) -> None:
        """Begin to write all."""
        for evictable in self.evictables():
            evictable.start_evict()

    def evict(self) -> None:
        """Have all in the file alone."""
        evictables = self.evictables()
        for evictable in evictables:
            evictable.start_evict()
        for evictable in evictables:
            evictable.evict()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within, all is in memory, to be read."""
        self._holders += 1
        self.fetch()
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self._let_go()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Within, all is in memory, and what changes is kept."""
        with self.reading():
            self._changed = True
            yield

    def _let_go(self) -> None:
        changed, self._changed = self._changed, False
        if changed:
            self.evict()
            return
        for evictable in self.evictables():
            evictable.drop()
