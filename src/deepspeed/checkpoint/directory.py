"""A checkpoint directory that appears whole or not at all.

Each rank writes ``rank_<r>.safetensors``; rank 0 adds ``index.json``, renames the temporary directory to the tag, and
writes ``latest`` last. A file is complete when its rename has happened, so a save that is killed leaves the previous
checkpoint as it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..comm import agreement
from ..comm.communicator import Communicator

FORMAT = "deepspeed-fragments"
VERSION = 1
INDEX = "index.json"
LATEST = "latest"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file and what is wrong."""


def write_checkpoint(
    directory: Path, tag: str, tensors: Mapping[str, Tensor], index: Mapping[str, Any], communicator: Communicator
) -> None:
    """Write ``tensors`` of every rank and rank 0's ``index`` under ``directory/tag``. Called on all ranks.

    Raises CheckpointError on every rank where one of them fails; nothing is left of the attempt then.
    """
    temporary = directory / f".{tag}.saving"

    def prepare() -> None:
        if communicator.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write() -> None:
        path = temporary / _file_name(communicator.rank)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        _sync(path)
        if communicator.rank == 0:
            content = {"format": FORMAT, "version": VERSION, "ranks": communicator.size, **index}
            _write_text(temporary / INDEX, json.dumps(content))

    def publish() -> None:
        if communicator.rank == 0:
            final = directory / tag
            replaced = directory / f".{tag}.replaced"
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                final.rename(replaced)
            temporary.rename(final)
            _sync(directory)
            shutil.rmtree(replaced, ignore_errors=True)

    try:
        for action in (prepare, write, publish):
            on_all_ranks(action, f"saving {directory / tag}", communicator)
    except CheckpointError:
        if communicator.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_latest(directory: Path, tag: str, communicator: Communicator) -> None:
    """Make ``tag`` the checkpoint that loads by default."""

    def write() -> None:
        if communicator.rank == 0:
            temporary = directory / f".{LATEST}"
            _write_text(temporary, tag)
            temporary.rename(directory / LATEST)

    on_all_ranks(write, f"writing {directory / LATEST}", communicator)


def read_latest(directory: Path) -> str | None:
    """The tag that ``latest`` names, None where there is none."""
    path = directory / LATEST
    return path.read_text().strip() if path.is_file() else None


class CheckpointReader:
    """Reads tensors by name from all ranks' files of one checkpoint."""

    def __init__(self, path: Path):
        self.path = path
        self.index = self._read_index()
        self._homes: dict[str, Path] = {}
        for rank in range(self.index["ranks"]):
            file = path / _file_name(rank)
            try:
                with safe_open(file, framework="pt") as content:
                    self._homes.update(dict.fromkeys(content.keys(), file))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} is missing or damaged ({error}): the checkpoint is incomplete") from error

    def _read_index(self) -> dict[str, Any]:
        file = self.path / INDEX
        try:
            index = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} is missing or damaged ({error}): this is not a whole checkpoint") from error
        if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
            raise CheckpointError(f"{file} is not the index of a {FORMAT} checkpoint of version {VERSION}")
        return index

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._homes)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        with safe_open(self._homes[name], framework="pt") as content:
            tensor: Tensor = content.get_tensor(name)
            return tensor


def _file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def on_all_ranks(action: Callable[[], None], what: str, communicator: Communicator) -> None:
    """Run ``action`` on every rank; where it fails on one, raise CheckpointError on all."""

    def checked() -> None:
        try:
            action()
        except Exception as error:
            raise CheckpointError(f"{what} failed on rank {communicator.rank}: {error}") from error

    agreement.on_all_ranks(checked, communicator, what=what, error=CheckpointError)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
