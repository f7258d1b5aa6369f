"""Writing tensors that are not all in memory at once to a safetensors file.

The format (https://huggingface.co/docs/safetensors): the length of a JSON header, the header with each tensor's dtype, shape
and place, then the bytes. A header says everything but the checksums before any byte is read; these have a known length, and
are written over placeholders at the end.
"""

from __future__ import annotations

import ctypes
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import EllipsisType

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Piece:
    """What is stored under one name: the elements ``where`` of a 1-D ``tensor``, or all of any tensor."""

    tensor: Tensor
    where: slice | EllipsisType = ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored shape."""
        return tuple(self.tensor.shape) if self.where is ... else (self.where.stop - self.where.start,)

    def values(self) -> Tensor:
        """The elements, contiguous and on the CPU."""
        return self.tensor.detach()[self.where].cpu().contiguous()


@dataclass(frozen=True)
class Pieces:
    """Pieces by name, whose values are in memory while ``present()`` is entered."""

    named: Mapping[str, Piece]
    present: Callable[[], AbstractContextManager[object]] = nullcontext


def write_pieces(path: Path, groups: Sequence[Pieces]) -> None:
    """Write all ``groups`` to ``path``, with the checksum of each piece in the file's metadata. One group after the other
    is in memory. Raises ValueError for a dtype that the format does not have."""
    sums = {name: "0" * 8 for group in groups for name in group.named}
    with path.open("wb") as file:
        file.write(_header(groups, sums))
        for group in groups:
            with group.present():
                for name, piece in group.named.items():
                    values = piece.values()
                    data = raw_bytes(values)
                    sums[name] = f"{zlib.crc32(data):08x}"
                    file.write(data)
        file.seek(0)
        file.write(_header(groups, sums))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, which must live as long as they are used. Not by ``numpy()``: torch would never
    again free the memory of a tensor that keeps its place."""
    nbytes = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")


def _header(groups: Sequence[Pieces], sums: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **sums}}
    start = 0
    for group in groups:
        for name, piece in group.named.items():
            dtype = piece.tensor.dtype
            if dtype not in DTYPES:
                raise ValueError(f"{name} is {dtype}, which safetensors has no name for")
            stop = start + prod(piece.shape) * dtype.itemsize
            entries[name] = {"dtype": DTYPES[dtype], "shape": list(piece.shape), "data_offsets": [start, stop]}
            start = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
