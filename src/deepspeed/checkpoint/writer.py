"""Writing tensors that are not all in memory at once to a safetensors file.

The format (https://huggingface.co/docs/safetensors): the length of a JSON header, the header with each tensor's dtype, shape
and place, then the bytes. Where all comes to lie is known before any byte is read, so room is reserved first: a disk that is
full is found at once. The bytes go through buffers in turn, one of which is filled while the others are written, past the
page cache where the file system can do that; they are hashed on the way. The header comes last, with the hash of each tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import EllipsisType

import torch
from torch import Tensor

from ..native.file_engine import QueueOptions
from ..native.files import File, FileQueue, FileTransfer, aligned_empty
from ..native.hashing import BLOCK, Hash, hash_of

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names of dtypes."""

BUFFER = 128 * BLOCK
"""Bytes of a buffer."""

BUFFERS = 3

ALIGNMENT = 4096
"""Bytes to which the header is filled up with spaces, so that buffers lie in the file as disks write."""

QUEUE = QueueOptions(block_size=1 << 20, queue_depth=16)


@dataclass(frozen=True)
class Piece:
    """What is stored under one name: the elements ``where`` of a 1-D ``tensor``, or all of any tensor."""

    tensor: Tensor
    where: slice | EllipsisType = ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored shape."""
        return tuple(self.tensor.shape) if self.where is ... else (self.where.stop - self.where.start,)

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in the file."""
        return prod(self.shape) * self.tensor.dtype.itemsize

    def content(self) -> Tensor:
        """The bytes, 1-D, where the tensor is."""
        return self.tensor.detach()[self.where].reshape(-1).view(torch.uint8)

    def snapshot(self) -> Piece:
        """The same in CPU memory of its own, which does not change."""
        return Piece(self.tensor.detach()[self.where].to("cpu", copy=True).contiguous())


@dataclass(frozen=True)
class Pieces:
    """Pieces by name, whose values are in memory while ``present()`` is entered. ``resident`` ones always are."""

    named: Mapping[str, Piece]
    present: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def resident(self) -> bool:
        """Whether the values are in memory without being asked for."""
        return self.present is nullcontext

    def snapshot(self) -> Pieces:
        """Copies of the values in CPU memory."""
        with self.present():
            return Pieces({name: piece.snapshot() for name, piece in self.named.items()})


@dataclass(frozen=True)
class Written:
    """A file that is on the disk: its ``nbytes``, and the hash of its header, which has the hashes of all else in it."""

    nbytes: int
    header: str


def write_pieces(path: Path, groups: Sequence[Pieces]) -> Written:
    """Write all ``groups`` to ``path`` and have the disk keep them. One group after the other is in memory, and ``BUFFERS``
    buffers. Raises ValueError for a dtype that the format does not have, OSError where the disk does not take the bytes."""
    hashes = {name: "0" * 16 for group in groups for name in group.named}
    start = len(_header(groups, hashes))
    nbytes = start + sum(piece.nbytes for group in groups for piece in group.named.values())
    with FileQueue(QUEUE) as queue, queue.open(path, nbytes=nbytes) as file:
        stream = _Stream(file, start)
        for group in groups:
            with group.present():
                for name, piece in group.named.items():
                    hashes[name] = stream.append(piece.content())
        stream.end()
    header = _header(groups, hashes)
    with path.open("r+b") as whole:
        whole.write(header)
        whole.flush()
        os.fsync(whole.fileno())
    return Written(nbytes, header_hash(header))


def header_hash(header: bytes) -> str:
    """The hash of a file's first bytes, up to its first tensor."""
    return hash_of(torch.frombuffer(bytearray(header), dtype=torch.uint8))


class _Stream:
    """Bytes that follow each other in ``file`` from ``start`` on."""

    def __init__(self, file: File, start: int):
        self._file = file
        self._at = start
        self._buffers = [aligned_empty(BUFFER, torch.uint8) for _ in range(BUFFERS)]
        self._transfers: list[FileTransfer | None] = [None] * BUFFERS
        self._current = 0
        self._filled = 0

    def append(self, data: Tensor) -> str:
        """Go on with ``data`` (1-D bytes on any device); returns its hash."""
        found = Hash()
        for part in data.split(BUFFER) if data.numel() else ():
            on_cpu = part.cpu()
            found.update(on_cpu)
            while on_cpu.numel():
                taken = on_cpu[: BUFFER - self._filled]
                self._buffers[self._current][self._filled : self._filled + len(taken)] = taken
                self._filled += len(taken)
                on_cpu = on_cpu[len(taken) :]
                if self._filled == BUFFER:
                    self._turn()
        return found.hexdigest()

    def end(self) -> None:
        """Have all bytes in the file."""
        self._turn()
        for index in range(BUFFERS):
            self._wait(index)

    def _turn(self) -> None:
        """Write this buffer, go on with the next."""
        if self._filled:
            data = self._buffers[self._current][: self._filled]
            self._transfers[self._current] = self._file.submit_write(data, self._at)
            self._at += self._filled
        self._current = (self._current + 1) % BUFFERS
        self._filled = 0
        self._wait(self._current)

    def _wait(self, index: int) -> None:
        transfer, self._transfers[index] = self._transfers[index], None
        if transfer is not None:
            transfer.wait()


def _header(groups: Sequence[Pieces], hashes: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **hashes}}
    start = 0
    for group in groups:
        for name, piece in group.named.items():
            dtype = piece.tensor.dtype
            if dtype not in DTYPES:
                raise ValueError(f"{name} is {dtype}, which safetensors has no name for")
            stop = start + piece.nbytes
            entries[name] = {"dtype": DTYPES[dtype], "shape": list(piece.shape), "data_offsets": [start, stop]}
            start = stop
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
