"""A foreign checkpoint once its files have been understood: where each range of each tensor is, and what is small."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..directory import CheckpointError
from ..source import WEIGHT, Part

OPTIMIZERS = {
    frozenset({"exp_avg", "exp_avg_sq"}): "AdamW",
    frozenset({"momentum_buffer"}): "SGD",
    frozenset({"exp_avg"}): "Lion",
    frozenset({"sum"}): "Adagrad",
}
"""Optimizers by the states of one value per element that they keep."""


@dataclass
class Contents:
    """What a reader of foreign files fills in. ``tensors`` are read when they are asked for, by any label; ``parts`` has the
    ranges of them that are a tensor of the model, end to end, by kind and name. ``numbers`` are the optimizer states of a
    parameter that are numbers; ``members`` are the names of each parameter group."""

    tensors: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    parts: dict[tuple[str, str], list[Part]] = field(default_factory=lambda: defaultdict(list))
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    members: list[list[str]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    optimizer: str | None = None
    dtype: str = "float32"
    clip: float = 0.0
    stage: int = 0
    ranks: int = 1
    scale: dict[str, float] = field(default_factory=dict)
    scheduler: dict[str, Any] | None = None
    counters: dict[str, int] = field(default_factory=dict)
    client: dict[str, Any] = field(default_factory=dict)

    def add_read(self, label: str, tensor: Tensor) -> None:
        """A tensor that has been read."""
        self.tensors[label] = lambda: tensor

    def add_whole(self, kind: str, name: str, tensor: Tensor, label: str) -> None:
        """A tensor that is stored whole."""
        self.add_read(label, tensor)
        self.parts[kind, name] = [Part(label, 0, tensor.numel())] if tensor.numel() else []

    def add_states(self, name: str, state: Mapping[str, Any], label: str) -> None:
        """The states of one parameter that are not elements of larger tensors."""
        for kind, value in state.items():
            if isinstance(value, Tensor) and tuple(value.shape) == self.shapes[name] and value.dim():
                self.add_whole(kind, name, value, f"{label}.{kind}")
        self.numbers[name] = numbers_of(state)


def numbers_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The states that are numbers, in the form of an index."""
    numbers: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() == 1 and value.dim() == 0:
            numbers[key] = {"tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
        elif isinstance(value, (bool, int, float)):
            numbers[key] = value
    return numbers


class ForeignCheckpoint:
    """A checkpoint that another program wrote, as ``Source`` describes one. ``check`` raises where a file is damaged."""

    def __init__(self, path: Path, contents: Contents, check: Callable[[], object]):
        self.path = path
        self.shapes = contents.shapes
        self.names = {name: contents.tied.get(name, name) for name in [*contents.shapes, *contents.tied]}
        self.index = _index(contents)
        self._contents = contents
        self._check = check
        self._checked = False

    def __enter__(self) -> ForeignCheckpoint:
        return self

    def __exit__(self, *error: object) -> None:
        """Files are mapped, and closed when nobody has a tensor of them."""

    def kinds(self, name: str) -> frozenset[str]:
        """What is stored of the tensor ``name``."""
        return frozenset(kind for kind, stored in self._contents.parts if stored == name)

    def parts(self, kind: str, name: str, start: int, numel: int) -> list[Part]:
        """Where elements ``[start, start + numel)`` of a flattened tensor are."""
        found, at, stop = [], 0, start + numel
        for part in self._contents.parts.get((kind, name), []):
            first, last = max(start, at), min(stop, at + part.numel)
            if first < last:
                found.append(Part(part.piece, part.start + first - at, last - first))
            at += part.numel
        if sum(part.numel for part in found) < numel:
            raise CheckpointError(f"{self.path} is incomplete: it has {at} elements of the {kind} of {name}")
        return found

    def verify(self, pieces: Iterable[str]) -> None:
        """Raise CheckpointError where the files are not what was saved: all of them are looked at."""
        if not self._checked and any(True for _ in pieces):
            self._check()
            self._checked = True

    def read_part(self, part: Part) -> Tensor:
        """The elements of a part, 1-D."""
        return self._contents.tensors[part.piece]().detach().reshape(-1)[part.start : part.start + part.numel]

    def whole(self, name: str) -> Tensor:
        """The weight ``name``, in its shape."""
        parts = [self.read_part(part) for part in self.parts(WEIGHT, name, 0, prod(self.shapes[name]))]
        return (torch.cat(parts) if parts else torch.empty(0)).view(self.shapes[name])

    def client_state(self) -> dict[str, Any]:
        """What the training program had saved beside."""
        return self._contents.client

    def rank_states(self, rank: int) -> dict[str, Any]:
        """Others do not save it in these files."""
        return {}


def _index(contents: Contents) -> dict[str, Any]:
    elementwise: dict[str, set[str]] = defaultdict(set)
    for kind, name in contents.parts:
        if kind != WEIGHT:
            elementwise[name].add(kind)
    optimizer = None
    if contents.groups:
        found = next((OPTIMIZERS.get(frozenset(kinds)) for kinds in elementwise.values()), None)
        optimizer = {
            "type": contents.optimizer or found or "unknown",
            "zero_stage": contents.stage,
            "groups": contents.groups,
            "members": contents.members,
            "clip": contents.clip,
            "scaler": {
                "type": "DynamicLossScaler" if contents.scale else "NoLossScaler",
                "state": contents.scale or {"scale": 1.0},
            },
            "parameters": [{"numbers": numbers, "names": [name]} for name, numbers in contents.numbers.items()],
        }
    return {
        "ranks": contents.ranks,
        "dtype": contents.dtype,
        "shapes": {name: list(shape) for name, shape in contents.shapes.items()},
        "tied": contents.tied,
        "frozen": sorted(set(contents.frozen)),
        "left_out": [],
        "counters": contents.counters,
        "scheduler": contents.scheduler,
        "optimizer": optimizer,
    }
