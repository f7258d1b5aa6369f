"""From a checkpoint that anybody wrote to one of this package."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from .directory import Attempt, write_checkpoint
from .reader import client_name, piece_name
from .script import write_script
from .source import Source, load_into, stored_dtype
from .values import encode
from .weight_files import Weight
from .writer import Piece, Pieces


class Alone:
    """The one rank of a program without a process group."""

    rank, size = 0, 1

    def gather_objects(self, value: object, *, purpose: str = "") -> list[Any]:
        """What everyone gives."""
        return [value]


def convert(source: Source, directory: Path, tag: str) -> Path:
    """Write ``source`` as ``directory/tag``, one tensor after the other, and make it the latest; returns the path. A tensor
    that is not as it was saved is found, and nothing is written then."""
    client: dict[str, Tensor] = {}
    index = {**source.index, "client_state": encode(source.client_state(), "client_state", client)}
    index.update(ranks=1, rank_states=[{}])
    for key in ("format", "version", "checksum", "files"):
        index.pop(key, None)
    groups = [_flat(source, kind, name) for name in source.shapes for kind in sorted(source.kinds(name))]
    groups.append(Pieces({client_name(name): Piece(value) for name, value in client.items()}))
    alone = Alone()
    write_checkpoint(Attempt(directory, tag, alone.size), groups, index, alone)
    write_script(directory)
    return directory / tag


def _flat(source: Source, kind: str, name: str) -> Pieces:
    def load(target: Tensor) -> None:
        load_into(source, kind, name, target)

    dtype = stored_dtype(source, kind, name)
    return Weight((piece_name(kind, name, 0),), (prod(source.shapes[name]),), dtype, load).pieces()
