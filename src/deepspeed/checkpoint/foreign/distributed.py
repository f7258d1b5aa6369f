"""The format of ``torch.distributed.checkpoint``, as FSDP and Accelerate save models and optimizers: a file ``.metadata`` that
says where each block of each tensor is, and files of blocks.

Of a state dict that was nested, the model's part is what is under ``model``, or all of it; an optimizer's is what has ``state``
and ``param_groups``, by the parameters' names.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..directory import CheckpointError
from ..source import WEIGHT, Part
from .pickles import first_line
from .stored import Contents, ForeignCheckpoint, numbers_of

METADATA = ".metadata"
ACCELERATE = ("pytorch_model_fsdp_0", "optimizer_0")
"""The directories in which Accelerate keeps a model and its optimizer."""

MODEL = ("model", "module", "model_state_dict")

ALLOWED = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "Path"},
}
"""What the metadata may be made of, by module; None is all of it."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        names = ALLOWED.get(module, set())
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if "." not in name and (is_dtype or names is None or name in names):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def is_distributed(path: Path) -> bool:
    """Whether the directory ``path`` has such files, or is one of Accelerate's with some."""
    return any((folder / METADATA).exists() for folder in (path, *(path / name for name in ACCELERATE)))


def read_distributed(path: Path) -> ForeignCheckpoint:
    """The checkpoint in ``path``. Raises CheckpointError where it is damaged, or not made of data alone."""
    contents = Contents()
    options: dict[tuple[Any, ...], Any] = {}
    states: list[tuple[str, str, _Saved]] = []
    for folder in [path] if (path / METADATA).exists() else [path / name for name in ACCELERATE if (path / name).is_dir()]:
        for keys, saved in _entries(folder):
            if "param_groups" in keys:
                options[keys[keys.index("param_groups") + 1 :]] = saved.value()
            elif "state" in keys[:-2]:
                states.append((str(keys[-2]), str(keys[-1]), saved))
            elif saved.shape is not None:
                name = ".".join(map(str, keys[1:] if keys[0] in MODEL and len(keys) > 1 else keys))
                contents.shapes[name] = saved.shape
                saved.add_to(contents, WEIGHT, name)
    for name, kind, saved in states:
        if saved.shape and saved.shape == contents.shapes.get(name):
            saved.add_to(contents, kind, name)
        else:
            value = saved.value()
            contents.numbers.setdefault(name, {}).update(numbers_of({kind: value}))
    _add_options(contents, options)
    return ForeignCheckpoint(path, contents, lambda: None)


class _Saved:
    """One entry of a state dict: a tensor in blocks, each with its offsets and sizes, or any value (``shape`` is None)."""

    def __init__(self, folder: Path, key: str, description: Any, storage: dict[Any, Any]):
        self._folder, self._key = folder, key
        self._blocks: list[Any] = getattr(description, "chunks", [])
        self.shape: tuple[int, ...] | None = tuple(description.size) if hasattr(description, "chunks") else None
        self._storage = storage

    def value(self) -> Any:
        """The whole value."""
        if self.shape is None:
            return self._read(None)
        whole: Tensor | None = None
        for index, block in enumerate(self._blocks):
            values = self._read(index)
            whole = torch.empty(self.shape, dtype=values.dtype) if whole is None else whole
            where = tuple(slice(start, start + size) for start, size in zip(block.offsets, block.sizes, strict=True))
            whole[where] = values
        return whole

    def add_to(self, contents: Contents, kind: str, name: str) -> None:
        """Say where the tensor is: in its blocks, one by one, where each is a range of it, else in the whole."""
        assert self.shape is not None, "only tensors are added"
        ranges = []
        for index, block in enumerate(self._blocks):
            inner = prod(self.shape[1:])
            if tuple(block.sizes[1:]) != self.shape[1:]:
                ranges = [(0, 0, prod(self.shape))]
                break
            numel = prod(block.sizes)
            if numel:
                ranges.append((block.offsets[0] * inner if self.shape else 0, index, numel))
        split = len(ranges) > 1 or len(self._blocks) == 1
        for _, index, numel in sorted(ranges):
            label = f"{self._folder.name}: {self._key}" + (f", block {index}" if split else "")
            contents.tensors[label] = partial(self._read, index) if split else self.value
            contents.parts[kind, name].append(Part(label, 0, numel))
        contents.parts[kind, name]  # a tensor without elements has no parts

    def _read(self, index: int | None) -> Any:
        offset = None if index is None else self._blocks[index].offsets
        found = [place for where, place in self._storage.items() if where.fqn == self._key and where.offset == offset]
        if not found:
            raise CheckpointError(f"{self._folder} is damaged: it does not say where {self._key} is")
        place = found[0]
        try:
            with (self._folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                return torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            where = self._folder / place.relative_path
            raise CheckpointError(f"{where} is missing or damaged at {self._key}: {first_line(error)}") from error


def _entries(folder: Path) -> Iterator[tuple[tuple[Any, ...], _Saved]]:
    """Each entry with its keys from the outermost dictionary on."""
    file = folder / METADATA
    try:
        with file.open("rb") as content:
            metadata = _Unpickler(content).load()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
        raise CheckpointError(f"{file} is missing or damaged, or of an unknown version: {error}") from error
    storage: dict[str, dict[Any, Any]] = {}
    for where, place in metadata.storage_data.items():
        storage.setdefault(where.fqn, {})[where] = place
    for key, description in metadata.state_dict_metadata.items():
        keys = tuple((metadata.planner_data or {}).get(key, (key,)))
        yield keys, _Saved(folder, key, description, storage.get(key, {}))


def _add_options(contents: Contents, options: dict[tuple[Any, ...], Any]) -> None:
    """The options of the parameter groups, saved as one list or value by value."""
    groups: dict[int, dict[str, Any]] = dict(enumerate(options.get((), [])))
    for keys, value in options.items():
        if keys:
            group = groups.setdefault(int(keys[0]), {})
            group.update({str(keys[1]): value} if len(keys) == 2 else value if len(keys) == 1 else {})
            if len(keys) > 2:
                group.setdefault(str(keys[1]), []).append(value)
    ordered = [groups[index] for index in sorted(groups)]
    contents.members = [[str(name) for name in group.get("params", [])] for group in ordered]
    plain = (bool, int, float, str, list, tuple)
    contents.groups = [{k: v for k, v in group.items() if k != "params" and isinstance(v, plain)} for group in ordered]
