"""What loads, exports and conversions ask of a checkpoint, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .reader import WEIGHT, Part


class Source(Protocol):
    """A checkpoint that is open: which ranges of the model's tensors it has, and where.

    ``index`` has what is small: counters, schedule, options of the optimizer. ``shapes`` are those of the model's tensors by
    name; ``names`` has the name under which each name of the model's state dict is stored.
    """

    path: Path
    index: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    names: dict[str, str]

    def __enter__(self) -> Source: ...

    def __exit__(self, *error: object) -> None: ...

    def kinds(self, name: str) -> frozenset[str]:
        """What is stored of the tensor ``name``: its weight, and the optimizer's states by their names."""

    def parts(self, kind: str, name: str, start: int, numel: int) -> list[Part]:
        """Where elements ``[start, start + numel)`` of a flattened tensor are. Raises CheckpointError where some are not."""

    def verify(self, pieces: Iterable[str]) -> None:
        """Raise CheckpointError where one of the stored ``pieces`` is not what was saved."""

    def read_part(self, part: Part) -> Tensor:
        """The elements of a part, 1-D."""

    def whole(self, name: str) -> Tensor:
        """The weight ``name``, in its shape."""

    def client_state(self) -> dict[str, Any]:
        """What the training program had saved beside."""

    def rank_states(self, rank: int) -> dict[str, Any]:
        """What a rank had for itself, nothing where the checkpoint does not have it."""


def load_into(source: Source, kind: str, name: str, target: Tensor) -> None:
    """Fill ``target``, of the shape of the tensor ``name``, part by part, in its own dtype. Raises CheckpointError for what is
    not as it was saved."""
    flat, at = target.view(-1), 0
    parts = source.parts(kind, name, 0, prod(source.shapes[name]))
    source.verify(part.piece for part in parts)
    for part in parts:
        flat[at : at + part.numel] = source.read_part(part)
        at += part.numel


def aliases(source: Source) -> Mapping[str, list[str]]:
    """All names of each tensor, by the one under which it is stored, in the order of the model."""
    found: dict[str, list[str]] = {}
    for name, stored in source.names.items():
        found.setdefault(stored, []).append(name)
    return found


def stored_dtype(source: Source, kind: str, name: str) -> Any:
    """The dtype of the tensor ``name``."""
    parts = source.parts(kind, name, 0, min(1, prod(source.shapes[name])))
    return source.read_part(parts[0]).dtype if parts else Tensor().dtype


__all__ = ["WEIGHT", "Part", "Source", "aliases", "load_into", "stored_dtype"]
