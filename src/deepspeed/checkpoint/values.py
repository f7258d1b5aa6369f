"""Python values as JSON and tensors, and back: what users put into ``client_state``.

JSON has no tuples, no dictionaries with other keys than strings, no tensors. Such a value becomes a dictionary whose
key ``__is__`` says what it was; the elements of tensors and arrays are kept apart, under names.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

KIND = "__is__"


def encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; the tensors in it are added to ``tensors`` under names that start with ``where``.

    Raises TypeError, naming the place, for what is none of: None, bool, int, float, str, list, tuple, set, dict,
    argparse.Namespace, tensor, NumPy array or number.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        name = f"{where}@{len(tensors)}"
        tensors[name] = value.detach().cpu().clone() if isinstance(value, Tensor) else _tensor(value, where)
        return {KIND: "tensor" if isinstance(value, Tensor) else "array", "name": name}
    if isinstance(value, Namespace):
        return {KIND: "namespace", "items": encode(vars(value), where, tensors)}
    if isinstance(value, Mapping):
        return _encode_mapping(value, where, tensors)
    if isinstance(value, (list, tuple, set)):
        items = [encode(item, f"{where}[{index}]", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {KIND: "tuple" if isinstance(value, tuple) else "set", "items": items}
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: give numbers, strings, lists, tuples, sets, "
        "dictionaries, tensors or arrays (an object's state_dict(), say)"
    )


def _tensor(array: np.ndarray[Any, Any], where: str) -> Tensor:
    try:
        return torch.from_numpy(array.copy())
    except TypeError as error:
        raise TypeError(f"{where} is an array of {array.dtype}, which a checkpoint cannot hold: give a list") from error


def _encode_mapping(value: Mapping[Any, Any], where: str, tensors: dict[str, Tensor]) -> Any:
    if all(isinstance(key, str) for key in value) and KIND not in value:
        return {key: encode(item, f"{where}[{key!r}]", tensors) for key, item in value.items()}
    pairs = [
        [encode(key, f"a key of {where}", tensors), encode(item, f"{where}[{key!r}]", tensors)] for key, item in value.items()
    ]
    return {KIND: "dict", "items": pairs}


def decode(value: Any, read: Callable[[str], Tensor]) -> Any:
    """What ``encode`` was given; ``read`` returns a tensor by its name."""
    if isinstance(value, list):
        return [decode(item, read) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(KIND)
    if kind is None:
        return {key: decode(item, read) for key, item in value.items()}
    if kind in ("tensor", "array"):
        tensor = read(value["name"])
        return tensor if kind == "tensor" else tensor.numpy()
    items = decode(value["items"], read)
    makers: dict[str, Callable[[Any], Any]] = {
        "tuple": tuple,
        "set": set,
        "dict": dict,
        "namespace": lambda of: Namespace(**of),
    }
    return makers[kind](items)
