"""Weights alone in the files that other programs load: one file, or several with an index, as ``from_pretrained`` of
Transformers finds them. Tensors come one at a time, and are not all in memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .writer import Piece, Pieces, write_pieces

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Weight:
    """A tensor that has all of ``names``. ``load`` fills a tensor of ``shape`` and ``dtype`` with its values."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[Tensor], object]

    @property
    def nbytes(self) -> int:
        """The size, once."""
        return prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Pieces:
        """What a safetensors file holds of it, once for each name, in memory only while it is written."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        storage = tensor.untyped_storage()
        storage.resize_(0)

        @contextmanager
        def present() -> Iterator[None]:
            storage.resize_(self.nbytes)
            try:
                self.load(tensor)
                yield
            finally:
                storage.resize_(0)

        return Pieces({name: Piece(tensor) for name in self.names}, present)


def write_weights(path: Path, weights: Sequence[Weight], max_shard_size: int | str | None = None) -> list[Path]:
    """Write ``weights`` to ``path``, as safetensors where its name ends so and as ``torch.save`` does otherwise; returns the
    files.

    What exceeds ``max_shard_size`` ("5GB", bytes, None for no limit) goes into ``<stem>-00001-of-00002<suffix>`` and so on,
    with an index ``<name>.index.json``. In memory are one tensor, and where it is safetensors nothing else; ``torch.save``
    has a file's tensors on the disk first. Each file appears whole or not at all.
    """
    files = split_weights(path, weights, max_shard_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        write_file(file, content)
    write_index(path, files)
    return list(files)


def split_weights(path: Path, weights: Sequence[Weight], max_shard_size: int | str | None) -> dict[Path, list[Weight]]:
    """Which file gets which weights. One that is larger than the limit has a file of its own."""
    limit = parse_size(max_shard_size)
    shards: list[list[Weight]] = [[]]
    filled = 0
    for weight in weights:
        if shards[-1] and filled + weight.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += weight.nbytes
    if len(shards) == 1:
        return {path: shards[0]}
    count = len(shards)
    return {path.with_name(f"{path.stem}-{n:05d}-of-{count:05d}{path.suffix}"): s for n, s in enumerate(shards, 1)}


def write_index(path: Path, files: Mapping[Path, Sequence[Weight]]) -> None:
    """Say which file has which tensor, where there are several."""
    if len(files) < 2:
        return
    homes = {name: file.name for file, weights in files.items() for weight in weights for name in weight.names}
    total = sum(weight.nbytes for weights in files.values() for weight in weights)
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, weights: Sequence[Weight]) -> None:
    """One file of :func:`write_weights`."""
    temporary = path.with_name(f".{path.name}.saving")
    try:
        if path.suffix == ".safetensors":
            write_pieces(temporary, [weight.pieces() for weight in weights])
        else:
            with scratch(path.parent) as empty:
                state = {}
                for weight in weights:
                    tensor = empty(weight.shape, weight.dtype)
                    weight.load(tensor)
                    state.update(dict.fromkeys(weight.names, tensor))
                torch.save(state, temporary)
        temporary.replace(path)
    except RuntimeError as error:
        # torch.save's word for a write that failed.
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def scratch(folder: Path) -> Iterator[Callable[[Sequence[int], torch.dtype], Tensor]]:
    """A function that returns tensors of a shape and dtype whose memory is a file in ``folder``, gone afterwards: the system
    writes out what does not fit in memory."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-") as place:
        count = iter(range(2**63))

        def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            if not prod(shape):
                return torch.empty(tuple(shape), dtype=dtype)
            flat = torch.from_file(f"{place}/{next(count)}", shared=True, size=prod(shape), dtype=dtype)
            return flat.view(tuple(shape))

        yield empty


def parse_size(size: int | str | None) -> float:
    """Bytes, from a number, "500MB", "5GB" and the like; None is no limit."""
    if size is None or isinstance(size, int):
        return float("inf") if size is None else size
    text = size.strip().upper()
    number, unit = (text[:-2], UNITS[text[-2:]]) if text[-2:] in UNITS else (text, 1)
    try:
        return float(number) * unit
    except ValueError:
        raise ValueError(f"'{size}' is not a size; write bytes, or a number with {', '.join(UNITS)}: 5GB") from None
