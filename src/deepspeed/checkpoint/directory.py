"""A checkpoint directory that appears whole or not at all.

Each rank writes ``rank_<r>.safetensors`` into a temporary directory, with a checksum of each tensor; rank 0 adds
``index.json``, with a checksum of its own, renames the directory to the tag, and writes ``latest`` last. A save that is
killed at any moment leaves the previous checkpoint loadable: one of the same tag is set aside as ``.<tag>.replaced``
between the two renames, and is found there. What such a save leaves behind is cleared by the next one of its tag.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..comm import agreement
from ..comm.communicator import Communicator
from .writer import Pieces, raw_bytes, write_pieces

FORMAT = "deepspeed-fragments"
VERSION = 1
INDEX = "index.json"
LATEST = "latest"
CHECKSUM = "checksum"

Result = TypeVar("Result")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file and what is wrong."""


def write_checkpoint(
    directory: Path, tag: str, groups: Sequence[Pieces], index: Mapping[str, Any], communicator: Communicator
) -> None:
    """Write the ``groups`` of every rank and rank 0's ``index`` under ``directory/tag``. Called on all ranks.

    Raises CheckpointError on every rank where one of them fails; nothing is left of the attempt then.
    """
    temporary = directory / f".{tag}.saving"

    def prepare() -> None:
        if Path(tag).name != tag or tag in ("", "..", LATEST):
            raise ValueError(f"the tag '{tag}' cannot be the name of a directory beside the file '{LATEST}'")
        if communicator.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write() -> None:
        path = temporary / file_name(communicator.rank)
        write_pieces(path, groups)
        _sync(path)
        if communicator.rank == 0:
            # As it will be read: JSON makes strings of keys and lists of tuples.
            content = json.loads(json.dumps({"format": FORMAT, "version": VERSION, "ranks": communicator.size, **index}))
            _write_text(temporary / INDEX, json.dumps({**content, CHECKSUM: index_checksum(content)}))

    def publish() -> None:
        if communicator.rank == 0:
            _sync(temporary)
            final, replaced = directory / tag, _replaced(directory, tag)
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
    """Make ``tag`` the checkpoint that loads by default. Called on all ranks."""

    def write() -> None:
        if communicator.rank == 0:
            temporary = directory / f".{LATEST}"
            _write_text(temporary, tag)
            temporary.rename(directory / LATEST)
            _sync(directory)

    on_all_ranks(write, f"writing {directory / LATEST}", communicator)


def read_latest(directory: Path) -> str | None:
    """The tag that ``latest`` names, None where there is none."""
    path = directory / LATEST
    return path.read_text().strip() if path.is_file() else None


def find_checkpoint(directory: Path, tag: str) -> Path:
    """The directory of the checkpoint ``tag``, or CheckpointError."""
    for path in (directory / tag, _replaced(directory, tag)):
        if path.is_dir():
            return path
    there = sorted(path.parent.name for path in directory.glob(f"*/{INDEX}")) if directory.is_dir() else []
    raise CheckpointError(f"{directory / tag} does not exist; {directory} has {', '.join(there) or 'no checkpoint'}")


def on_all_ranks(action: Callable[[], Result], what: str, communicator: Communicator) -> Result:
    """Run ``action``, which must not communicate, on every rank; where it fails on one, raise CheckpointError on all."""

    def checked() -> Result:
        try:
            return action()
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{what} failed on rank {communicator.rank}: {error}") from error

    return agreement.on_all_ranks(checked, communicator, what=what, error=CheckpointError)


def file_name(rank: int) -> str:
    """The file in which a rank keeps its tensors."""
    return f"rank_{rank:05d}.safetensors"


def checksum(tensor: Tensor) -> str:
    """CRC-32 of the elements of a contiguous CPU tensor, as eight hexadecimal digits."""
    return f"{zlib.crc32(raw_bytes(tensor)):08x}"


def index_checksum(index: Mapping[str, Any]) -> str:
    """CRC-32 of an index, but for its own checksum, as eight hexadecimal digits."""
    content = {key: value for key, value in index.items() if key != CHECKSUM}
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _replaced(directory: Path, tag: str) -> Path:
    return directory / f".{tag}.replaced"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
