"""What a checkpoint is and holds, and in what two differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from rich.table import Table

from .opening import kind_of
from .source import WEIGHT, Source, load_into, stored_dtype


def summary(source: Source) -> list[Any]:
    """Lines and a table of the sizes of what there is, by parameter group and kind. Reads everything.

    Raises CheckpointError where it is not whole, or not what was saved.
    """
    index, optimizer = source.index, source.index["optimizer"]
    sizes = _sizes(source)
    lines: list[Any] = [f"{source.path}: {kind_of(source.path)}"]
    steps = index["counters"].get("global_steps")
    if steps is not None:
        lines.append(f"after {steps} optimizer steps; saved by {_count(index['ranks'], 'rank')}")
    if optimizer is not None:
        lines.append(f"optimizer {optimizer['type']} at ZeRO stage {optimizer['zero_stage']}")
    if index["scheduler"] is not None:
        lines.append(f"schedule {index['scheduler']['type']}")
    numel = sum(prod(shape) for shape in source.shapes.values())
    lines.append(f"{len(source.shapes)} tensors of the model with {numel:,} elements, {len(index['tied'])} more names of them")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("group", "kind", "dtype", "tensors", "bytes"):
        table.add_column(column, justify="right" if column in ("tensors", "bytes") else "left")
    for (group, kind, dtype), found in sizes.items():
        table.add_row(group, kind, dtype.removeprefix("torch."), f"{len(found):,}", f"{sum(found):,}")
    return [*lines, table, "whole and verified"]


def _sizes(source: Source) -> dict[tuple[str, str, str], list[int]]:
    """The bytes of each tensor, by group, kind and dtype. All parts are read and verified."""
    group_of = _groups(source)
    sizes: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for name, shape in source.shapes.items():
        for kind in sorted(source.kinds(name), key=lambda kind: (kind != WEIGHT, kind)):
            parts = source.parts(kind, name, 0, prod(shape))
            source.verify(part.piece for part in parts)
            dtype = stored_dtype(source, kind, name)
            sizes[group_of.get(name, "not trained"), kind, str(dtype)].append(prod(shape) * dtype.itemsize)
    return dict(sorted(sizes.items(), key=lambda item: (item[0][0], item[0][1] != WEIGHT, item[0][1])))


def _groups(source: Source) -> dict[str, str]:
    """The parameter group of each trained parameter. Checkpoints from before groups had members have one for all."""
    optimizer = source.index["optimizer"]
    if optimizer is None:
        return {name: "weights" for name in source.shapes}
    members: Iterable[list[str]] = optimizer.get("members") or []
    found = {name: str(number) for number, names in enumerate(members) for name in names}
    return found or {name: "trained" for name in source.shapes if source.kinds(name) > {WEIGHT}}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def difference(source: Source, other: Source) -> list[str]:
    """What one has and the other has not, and where values differ: by how much at most, and in how many elements."""
    lines = []
    for one, two in ((source, other), (other, source)):
        lines += [f"only in {one.path}: {name}" for name in one.shapes if name not in two.shapes]
    for name, shape in source.shapes.items():
        if name not in other.shapes:
            continue
        if other.shapes[name] != shape:
            lines.append(f"{name}: shape {shape} and {other.shapes[name]}")
            continue
        lines += [f"{name}: {kind} is in one alone" for kind in sorted(source.kinds(name) ^ other.kinds(name))]
        for kind in sorted(source.kinds(name) & other.kinds(name)):
            lines += _compared(source, other, kind, name)
    for what in ("counters", "scheduler"):
        if source.index[what] != other.index[what]:
            lines.append(f"{what}: {source.index[what]} and {other.index[what]}")
    return lines


def _compared(source: Source, other: Source, kind: str, name: str) -> list[str]:
    values = []
    for one in (source, other):
        values.append(torch.empty(one.shapes[name], dtype=stored_dtype(one, kind, name)))
        load_into(one, kind, name, values[-1])
    a, b = (value.double() if value.is_floating_point() else value for value in values)
    differing = int((a != b).sum())
    if not differing:
        return []
    largest = float((a.double() - b.double()).abs().max())
    return [f"{name}: {kind} differs in {differing:,} of {a.numel():,} elements, by {largest:.3g} at most"]
