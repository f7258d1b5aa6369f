"""Which parameter an optimizer's state belongs to, where a file has only numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..directory import CheckpointError

Shape = tuple[int, ...]


def names_of_states(
    groups: Sequence[Sequence[int]], shape_of: Mapping[int, Shape], named: Mapping[str, Shape], path: Path
) -> dict[int, str]:
    """The names of the numbered parameters that have states of a known shape. The parameters of a group come in the order
    in which ``named`` has them; this leaves one way to match their shapes, or CheckpointError is raised."""
    found: dict[int, str] = {}
    for group in groups:
        numbers = [number for number in group if shape_of.get(number)]
        first = _matched(numbers, shape_of, named.items())
        last = _matched(numbers[::-1], shape_of, list(named.items())[::-1])
        if first is None or first != last:
            raise CheckpointError(
                f"{path} does not say which parameters its optimizer's states are of, and their shapes leave more than one way "
                "or none: save it at ZeRO stage 1, or load the weights alone (load_optimizer_states=False)"
            )
        found |= first
    return found


def _matched(
    numbers: Iterable[int], shape_of: Mapping[int, Shape], named: Iterable[tuple[str, Shape]]
) -> dict[int, str] | None:
    """Each number with the next name of its shape; None where the names do not last."""
    left, found = iter(named), {}
    for number in numbers:
        name = next((name for name, shape in left if shape == shape_of[number]), None)
        if name is None:
            return None
        found[number] = name
    return found
