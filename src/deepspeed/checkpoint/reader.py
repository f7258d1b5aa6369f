"""Reading a checkpoint: which stored pieces hold a range of a tensor, and their elements.

A tensor of the checkpoint is known by its *kind* (``weight``, or the name of an optimizer state) and its *name* in the
model. It is stored flat, in *pieces*, one for each rank that owned a part, named ``<kind>/<name>@<start>``. Tensors of
``client_state`` and of what each rank keeps for itself have such names too, of the kinds ``client`` and ``rank``.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .directory import CHECKSUM, FORMAT, INDEX, VERSION, CheckpointError, checksum, file_name, index_checksum
from .values import decode
from .writer import header_hash

WEIGHT = "weight"
CLIENT, RANK = "client", "rank"
"""Kinds of tensors that are none of the model's."""


def piece_name(kind: str, name: str, start: int) -> str:
    """The name under which elements of a tensor from ``start`` on are stored."""
    return f"{kind}/{name}@{start}"


def client_name(name: str) -> str:
    """The name under which a tensor of ``client_state`` is stored."""
    return f"{CLIENT}/{name}"


def rank_name(name: str) -> str:
    """The name under which a tensor of a rank's own states is stored."""
    return f"{RANK}/{name}"


@dataclass(frozen=True)
class Part:
    """Elements ``[start, start + numel)`` of the stored tensor ``piece``."""

    piece: str
    start: int
    numel: int


class CheckpointReader:
    """One checkpoint's index and stored tensors. A context manager: it holds files open.

    ``index`` is the whole index; ``shapes`` are those of the model's tensors, by name. ``names`` has, for each name in
    the model's state dict, the name by which the tensor is stored: tied tensors are stored once.
    """

    def __init__(self, path: Path):
        self.path = path
        self.index = self._read_index()
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in self.index["shapes"].items()}
        self.names = {name: name for name in self.shapes}
        self.names |= {name: stored for name, stored in self.index.get("tied", {}).items() if stored in self.shapes}
        self._files: dict[str, Any] = {}
        self._homes: dict[str, Path] = {}
        self._pieces: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
        self._kinds: dict[str, set[str]] = defaultdict(set)
        self._stack = ExitStack()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def kinds(self, name: str) -> frozenset[str]:
        """The kinds of which the tensor ``name`` is stored: none for a name that the checkpoint does not have."""
        return frozenset(self._kinds.get(name, ()))

    def parts(self, kind: str, name: str, start: int, numel: int) -> list[Part]:
        """Where elements ``[start, start + numel)`` of a flattened tensor are stored, in order.

        Raises CheckpointError where some are stored nowhere.
        """
        found = []
        stop = start + numel
        for piece_start, piece in self._pieces.get((kind, name), []):
            piece_stop = piece_start + prod(self._files[piece].get_slice(piece).get_shape())
            if piece_start <= start < min(piece_stop, stop):
                end = min(piece_stop, stop)
                found.append(Part(piece, start - piece_start, end - start))
                start = end
        if start < stop:
            raise CheckpointError(f"{self.path} is incomplete: it lacks the elements {start} to {stop - 1} of {kind}/{name}")
        return found

    def verify(self, pieces: Iterable[str]) -> None:
        """Read stored tensors and raise CheckpointError, naming the first that is not what was saved."""
        for piece in sorted(set(pieces)):
            self.verified(piece)

    def verified(self, piece: str) -> Tensor:
        """One stored tensor, or CheckpointError where it is not what was saved."""
        tensor = self.read(piece)
        if (self._files[piece].metadata() or {}).get(piece) != checksum(tensor):
            file = self._homes[piece]
            raise CheckpointError(f"{file} is damaged: the checksum of {piece} is not that of its elements")
        return tensor

    def read(self, piece: str) -> Tensor:
        """One stored tensor."""
        tensor: Tensor = self._files[piece].get_tensor(piece)
        return tensor

    def read_part(self, part: Part) -> Tensor:
        """The elements of a part, 1-D."""
        return self.read(part.piece).reshape(-1)[part.start : part.start + part.numel]

    def whole(self, name: str) -> Tensor:
        """The weight ``name``, in its shape."""
        shape = self.shapes[name]
        parts = [self.read_part(part) for part in self.parts(WEIGHT, name, 0, prod(shape))]
        return (torch.cat(parts) if parts else torch.empty(0)).view(shape)

    def client_state(self) -> dict[str, Any]:
        """What ``save_checkpoint`` was given as ``client_state``."""
        state: dict[str, Any] = decode(self.index["client_state"], lambda name: self.verified(client_name(name)))
        return state

    def rank_states(self, rank: int) -> dict[str, Any]:
        """What the rank ``rank`` of those that saved had for itself: its random states and its place in the data."""
        state: dict[str, Any] = decode(self.index["rank_states"][rank], lambda name: self.verified(rank_name(name)))
        return state

    def verify_all(self) -> None:
        """Read everything and raise CheckpointError, naming the first tensor that is not what was saved."""
        self.verify(self._files)

    def _open(self) -> None:
        for rank in range(self.index["ranks"]):
            file = self.path / file_name(rank)
            self._check(file)
            try:
                content = self._stack.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} is missing or damaged ({error}): the checkpoint is incomplete") from error
            for piece in content.keys():  # noqa: SIM118, this is no dictionary
                self._files[piece] = content
                self._homes[piece] = file
                kind, _, label = piece.partition("/")
                name, _, start = label.rpartition("@")
                if not start.isdecimal():
                    raise CheckpointError(f"{file} is damaged: it has a tensor {piece!r}, which names no elements")
                self._pieces[kind, name].append((int(start), piece))
                if kind not in (CLIENT, RANK):
                    self._kinds[name].add(kind)
        for pieces in self._pieces.values():
            pieces.sort()

    def _check(self, file: Path) -> None:
        """Raise CheckpointError where a file is not as long as it was written, or its header not what was written."""
        expected = self.index["files"][file.name]
        try:
            with file.open("rb") as content:
                start = content.read(8)
                header = start + content.read(min(int.from_bytes(start, "little"), expected["nbytes"]))
                nbytes = content.seek(0, os.SEEK_END)
        except OSError as error:
            raise CheckpointError(f"{file} is missing or damaged ({error}): the checkpoint is incomplete") from error
        if nbytes != expected["nbytes"]:
            raise CheckpointError(f"{file} is missing or damaged: it has {nbytes} bytes, and {expected['nbytes']} were written")
        if header_hash(header) != expected["header"]:
            raise CheckpointError(f"{file} is damaged: the checksum of its header is not that of its content")

    def _read_index(self) -> dict[str, Any]:
        file = self.path / INDEX
        try:
            index = json.loads(file.read_text())
        except FileNotFoundError as error:
            there = ", ".join(sorted(path.name for path in self.path.iterdir())[:5]) or "nothing"
            raise CheckpointError(
                f"{file} is missing: this is not a checkpoint of this package, or not a whole one. The directory holds {there}."
            ) from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged ({error}): this is not a whole checkpoint") from error
        if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
            raise CheckpointError(f"{file} is not the index of a {FORMAT} checkpoint of version {VERSION}")
        if index.get(CHECKSUM) != index_checksum(index):
            raise CheckpointError(f"{file} is damaged: its checksum is not that of its content")
        return index
