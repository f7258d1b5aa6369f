"""A small checkpoint of two tensors, one of them in two pieces, without an engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from deepspeed.checkpoint.directory import Attempt, write_checkpoint
from deepspeed.checkpoint.reader import WEIGHT, CheckpointReader, piece_name
from deepspeed.checkpoint.writer import Piece, Pieces

ALONE: Any = SimpleNamespace(rank=0, size=1, gather_objects=lambda value, purpose="": [value])
SHAPES = {"matrix": (3, 4), "model.bias": (5,)}


def pieces(value: float) -> dict[str, Tensor]:
    matrix = torch.arange(12.0) + value
    return {
        piece_name(WEIGHT, "matrix", 0): matrix[:7],
        piece_name(WEIGHT, "matrix", 7): matrix[7:],
        piece_name(WEIGHT, "model.bias", 0): torch.full((5,), value, dtype=torch.bfloat16),
        piece_name("exp_avg", "matrix", 0): torch.zeros(12),
    }


def save(directory: Path, tag: str, value: float, communicator: Any = ALONE, *, keep: int | None = None) -> None:
    index = {"shapes": {name: list(shape) for name, shape in SHAPES.items()}, "value": value}
    named = {name: Piece(tensor) for name, tensor in pieces(value).items()}
    write_checkpoint(Attempt(directory, tag, communicator.size, keep), [Pieces(named)], index, communicator)


def load(path: Path) -> tuple[float, dict[str, Tensor]]:
    """Everything that ``save`` wrote, checked."""
    with CheckpointReader(path) as reader:
        numels = [(WEIGHT, "matrix", 12), (WEIGHT, "model.bias", 5), ("exp_avg", "matrix", 12)]
        parts = {(kind, name): reader.parts(kind, name, 0, numel) for kind, name, numel in numels}
        reader.verify(part.piece for found in parts.values() for part in found)
        values = {f"{kind} {name}": torch.cat([reader.read_part(p) for p in found]) for (kind, name), found in parts.items()}
        return reader.index["value"], values


def is_saved(found: tuple[float, dict[str, Tensor]], value: float) -> bool:
    number, tensors = found
    own = pieces(value)
    return (
        number == value
        and torch.equal(tensors[f"{WEIGHT} matrix"], torch.arange(12.0) + value)
        and torch.equal(tensors[f"{WEIGHT} model.bias"], own[piece_name(WEIGHT, "model.bias", 0)])
        and torch.equal(tensors["exp_avg matrix"], torch.zeros(12))
    )
