"""From a directory to the checkpoint in it, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .directory import INDEX, CheckpointError, find_checkpoint, read_latest
from .foreign.distributed import is_distributed, read_distributed
from .foreign.pretrained import is_pretrained, read_pretrained
from .foreign.zero import is_original, is_universal, read_original
from .reader import CheckpointReader
from .source import Source

Kind = tuple[str, Callable[[Path], bool], Callable[[Path], Source]]

KINDS: tuple[Kind, ...] = (
    ("a checkpoint of this package", lambda path: (path / INDEX).exists(), CheckpointReader),
    ("a universal checkpoint of the original DeepSpeed", is_universal, read_original),
    ("a checkpoint of the original DeepSpeed", is_original, read_original),
    ("a checkpoint of torch.distributed.checkpoint", is_distributed, read_distributed),
    ("weights alone", is_pretrained, read_pretrained),
)
"""What a directory may hold: a name of it, whether it is that, and how it is read. The first that it is counts."""


def kind_of(path: Path) -> str | None:
    """What the directory ``path`` is, None where it is no checkpoint."""
    return next((name for name, matches, _ in KINDS if matches(path)), None)


def open_source(path: Path) -> Source:
    """The checkpoint in the directory ``path``, to read. Raises CheckpointError for one that is damaged, or that is none."""
    reader = next((reader for _, matches, reader in KINDS if matches(path)), CheckpointReader)
    return reader(path)


def resolve(directory: Path, tag: str | None = None) -> Path:
    """The directory of one checkpoint: ``directory/tag``; without a tag the one that ``latest`` names, or ``directory`` itself.
    Raises CheckpointError where there is none."""
    if tag is not None:
        return find_checkpoint(directory, tag)
    found = read_latest(directory)
    if found is not None:
        return find_checkpoint(directory, found)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory")
    if kind_of(directory) is None:
        there = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{directory} is no checkpoint that is known here, and has no file 'latest'. It holds {there}.")
    return directory
