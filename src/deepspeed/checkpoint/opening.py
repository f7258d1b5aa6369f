"""From a directory to the checkpoint in it, whoever wrote it."""

from __future__ import annotations

from pathlib import Path

from .directory import INDEX
from .foreign.zero import is_original, read_original
from .reader import CheckpointReader
from .source import Source


def open_source(path: Path) -> Source:
    """The checkpoint in the directory ``path``, to read. Raises CheckpointError for one that is damaged, or that is none."""
    if not (path / INDEX).exists() and is_original(path):
        return read_original(path)
    return CheckpointReader(path)
