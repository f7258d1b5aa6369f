"""A checkpoint directory that appears whole or not at all.

Each rank writes ``rank_<r>.safetensors`` into a temporary directory. When all have, rank 0 adds ``index.json``, which says how
long each file is and what its header's hash is (the header has the hashes of the tensors), renames the directory to the tag,
writes ``latest``, and removes what is older than is to be kept. Everything is on the disk before what follows it. So a save
that is killed at any moment leaves the previous checkpoint loadable: one of the same tag is set aside as ``.<tag>.replaced``
between two renames, and is found there. What such a save leaves behind is cleared by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..comm import agreement
from ..comm.agreement import Ranks
from ..native.hashing import hash_of
from .ownership import Claim, abandoned
from .writer import Pieces, Written, write_pieces

FORMAT = "deepspeed-fragments"
VERSION = 2
INDEX = "index.json"
LATEST = "latest"
CHECKSUM = "checksum"

SAVING, REPLACED, REMOVED = "saving", "replaced", "removed"
"""What ``.<tag>.<word>`` is: being written; set aside for a newer one of the same tag; being deleted."""

Result = TypeVar("Result")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Attempt:
    """The save of the checkpoint ``tag`` by ``ranks`` ranks. Rank 0 begins and publishes; in between, each rank writes. With
    ``keep`` so many checkpoints stay in the directory; with ``latest`` it is the one that loads by default."""

    directory: Path
    tag: str
    ranks: int
    keep: int | None = None
    latest: bool = True

    @property
    def temporary(self) -> Path:
        """Where the files are until they are whole."""
        return _beside(self.directory, self.tag, SAVING)

    def begin(self) -> Claim:
        """Make room, and clear what earlier saves left behind. Returns what shows others that this save is alive."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.temporary.exists() and not abandoned(self.temporary):
            raise CheckpointError(f"{self.directory / self.tag} is being saved already: wait for that save")
        clear(self.directory)
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()
        return Claim(self.temporary)

    def write(self, rank: int, groups: Sequence[Pieces]) -> Written:
        """Write one rank's file."""
        return write_pieces(self.temporary / file_name(rank), groups)

    def publish(self, index: Mapping[str, Any], written: Sequence[Written]) -> None:
        """Make the checkpoint appear: all ranks have written."""
        files = {file_name(rank): asdict(one) for rank, one in enumerate(written)}
        # As it will be read: JSON makes strings of keys and lists of tuples.
        content = json.loads(json.dumps({"format": FORMAT, "version": VERSION, "ranks": self.ranks, "files": files, **index}))
        _write_text(self.temporary / INDEX, json.dumps({**content, CHECKSUM: index_checksum(content)}))
        _sync(self.temporary)
        final, replaced = self.directory / self.tag, _beside(self.directory, self.tag, REPLACED)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        self.temporary.rename(final)
        _sync(self.directory)
        if self.latest:
            write_latest(self.directory, self.tag)
        shutil.rmtree(replaced, ignore_errors=True)
        if self.keep is not None:
            remove_older(self.directory, keep=self.keep, stays=self.tag)

    def abandon(self) -> None:
        """Leave nothing of an attempt that failed."""
        shutil.rmtree(self.temporary, ignore_errors=True)


def write_checkpoint(attempt: Attempt, groups: Sequence[Pieces], index: Mapping[str, Any], communicator: Ranks) -> None:
    """Write the ``groups`` of every rank and rank 0's ``index``. Called on all ranks.

    Raises CheckpointError on every rank where one of them fails; nothing is left of the attempt then.
    """
    what, first = f"saving {attempt.directory / attempt.tag}", communicator.rank == 0
    claim = begin_on_all_ranks(attempt, communicator)
    try:
        written = on_all_ranks(lambda: attempt.write(communicator.rank, groups), what, communicator)
        everyones = communicator.gather_objects(written, purpose=what)
        on_all_ranks(lambda: attempt.publish(index, everyones) if first else None, what, communicator)
    except CheckpointError:
        if first:
            attempt.abandon()
        raise
    finally:
        claim.release()


def begin_on_all_ranks(attempt: Attempt, communicator: Ranks) -> Claim:
    """Have rank 0 begin. Called on all ranks. Raises CheckpointError for a tag that is not the name of a directory."""

    def begin() -> Claim:
        tag = attempt.tag
        if Path(tag).name != tag or tag in ("", "..", LATEST):
            raise ValueError(f"the tag '{tag}' cannot be the name of a directory beside the file '{LATEST}'")
        return attempt.begin() if communicator.rank == 0 else Claim(None)

    return on_all_ranks(begin, f"saving {attempt.directory / attempt.tag}", communicator)


def write_latest(directory: Path, tag: str) -> None:
    """Make ``tag`` the checkpoint that loads by default."""
    temporary = directory / f".{LATEST}"
    _write_text(temporary, tag)
    temporary.rename(directory / LATEST)
    _sync(directory)


def read_latest(directory: Path) -> str | None:
    """The tag that ``latest`` names, None where there is none."""
    path = directory / LATEST
    return path.read_text().strip() if path.is_file() else None


def find_checkpoint(directory: Path, tag: str) -> Path:
    """The directory of the checkpoint ``tag``, or CheckpointError."""
    for path in (directory / tag, _beside(directory, tag, REPLACED)):
        if path.is_dir():
            return path
    there = [path.name for path in whole_checkpoints(directory)] if directory.is_dir() else []
    raise CheckpointError(f"{directory / tag} does not exist; {directory} has {', '.join(sorted(there)) or 'no checkpoint'}")


def whole_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in ``directory`` whose files are all there, as long as they were written, oldest first. Their content
    is not read."""
    found = [path.parent for path in directory.glob(f"*/{INDEX}") if not path.parent.name.startswith(".")]
    return sorted(filter(_is_whole, found), key=lambda path: (path / INDEX).stat().st_mtime_ns)


def remove_older(directory: Path, *, keep: int, stays: str) -> None:
    """Delete all but the newest ``keep`` whole checkpoints. What is not whole does not count and is left alone; so are the
    tag ``stays`` and the one that ``latest`` names."""
    lasting = {stays, read_latest(directory)}
    for path in whole_checkpoints(directory)[:-keep]:
        if path.name not in lasting:
            _remove(path)


def clear(directory: Path) -> None:
    """Remove what saves that were killed left in ``directory``; a checkpoint that one had set aside comes back to its tag."""
    for word in (REMOVED, REPLACED, SAVING):
        for path in directory.glob(f".*.{word}"):
            tag = path.name[1 : -len(word) - 1]
            saving = _beside(directory, tag, SAVING)
            if saving.exists() and not abandoned(saving):
                continue
            if word == REPLACED and not (directory / tag).exists():
                path.rename(directory / tag)
            else:
                shutil.rmtree(path, ignore_errors=True)


def on_all_ranks(action: Callable[[], Result], what: str, communicator: Ranks) -> Result:
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
    """The hash of the elements of a CPU tensor, as sixteen hexadecimal digits."""
    return hash_of(tensor.contiguous())


def index_checksum(index: Mapping[str, Any]) -> str:
    """The hash of an index but for its own, as JSON with sorted keys, in sixteen hexadecimal digits."""
    content = {key: value for key, value in index.items() if key != CHECKSUM}
    return hash_of(torch.frombuffer(bytearray(json.dumps(content, sort_keys=True).encode()), dtype=torch.uint8))


def _is_whole(path: Path) -> bool:
    try:
        index = json.loads((path / INDEX).read_text())
        if index["format"] != FORMAT or index[CHECKSUM] != index_checksum(index):
            return False
        return all((path / name).stat().st_size == file["nbytes"] for name, file in index["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove(path: Path) -> None:
    """Delete a checkpoint, which is out of sight before its first file is."""
    removed = _beside(path.parent, path.name, REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _beside(directory: Path, tag: str, word: str) -> Path:
    return directory / f".{tag}.{word}"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
