"""Tensors inside what modules take, return and keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 4
"""How deep tensors are looked for: a list in a dataclass in a dictionary, and its items."""

_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))


def differentiable(value: Any) -> list[Tensor]:
    """The tensors with a gradient in ``value``, each once: in tuples, lists, mappings and attributes of objects."""
    return list({id(t): t for t in _tensors(value, DEPTH) if t.requires_grad}.values())


def next_node() -> int:
    """The number of the autograd node that this thread makes next. Backward runs nodes from the highest number down."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def made_since(node: int, value: Any) -> list[Tensor]:
    """Those of the tensors in ``value`` that were computed since ``next_node()`` was ``node``, and have a gradient."""
    return [t for t in differentiable(value) if t.grad_fn is not None and t.grad_fn._sequence_nr() >= node]


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth > 0 and type(value) not in _PLAIN:
        for item in _items(value):
            yield from _tensors(item, depth - 1)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple)):
        return value
    # Neither modules, which have parameters, nor classes and functions.
    return () if isinstance(value, (nn.Module, type)) or callable(value) else getattr(value, "__dict__", {}).values()
