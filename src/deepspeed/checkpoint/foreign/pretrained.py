"""Weights as Transformers and others save them: safetensors or ``torch.save`` files, with an index where there are several."""

from __future__ import annotations

import json
from functools import partial
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..directory import CheckpointError
from ..source import WEIGHT, Part
from .pickles import check_file, load_pickle
from .stored import Contents, ForeignCheckpoint

SINGLE = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
INDEXED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def is_pretrained(path: Path) -> bool:
    """Whether the directory ``path`` has such files."""
    return any((path / name).exists() for name in (*SINGLE, *INDEXED))


def read_pretrained(path: Path) -> ForeignCheckpoint:
    """The weights in ``path``. Raises CheckpointError where files are missing or damaged."""
    contents, files = Contents(), _files(path)
    for file in files:
        if file.suffix == ".safetensors":
            _add_safetensors(contents, file)
        else:
            for name, value in load_pickle(file).items():
                if isinstance(value, Tensor):
                    contents.shapes[name] = tuple(value.shape)
                    contents.add_whole(WEIGHT, name, value, name)

    def check() -> None:
        for file in files:
            if file.suffix != ".safetensors":
                check_file(file)

    return ForeignCheckpoint(path, contents, check)


def _files(path: Path) -> list[Path]:
    for name in INDEXED:
        if (path / name).exists():
            homes = json.loads((path / name).read_text())["weight_map"]
            return [path / file for file in sorted(set(homes.values()))]
    return [next(path / name for name in SINGLE if (path / name).exists())]


def _add_safetensors(contents: Contents, file: Path) -> None:
    try:
        content = safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from error
    for name in content.keys():  # noqa: SIM118, this is no dictionary
        shape = tuple(content.get_slice(name).get_shape())
        contents.shapes[name] = shape
        contents.tensors[name] = partial(content.get_tensor, name)
        contents.parts[WEIGHT, name] = [Part(name, 0, prod(shape))] if prod(shape) else []
