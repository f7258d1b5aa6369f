"""Saving in the layout of the original DeepSpeed: as fragments first, of which each rank then makes its own files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from ..comm.communicator import Communicator
from .directory import REPLACED, SAVING, Attempt, on_all_ranks, write_checkpoint, write_latest
from .foreign.writing import Layout, write_rank
from .reader import CheckpointReader
from .writer import Pieces


def write_in_original_layout(
    attempt: Attempt, groups: Sequence[Pieces], index: Mapping[str, Any], communicator: Communicator
) -> None:
    """Write the checkpoint of ``attempt``. Called on all ranks. Raises CheckpointError on every rank where one of them fails;
    nothing is left then, and a checkpoint of the same tag stays. What a save that is killed leaves, the next one clears."""
    directory, tag = attempt.directory, attempt.tag
    final, replaced = directory / tag, directory / f".{tag}.{REPLACED}"
    fragments, made = f".{tag}.fragments.{SAVING}", directory / f".{tag}.made.{SAVING}"
    what = f"saving {final}"

    def prepare() -> None:
        if communicator.rank == 0:
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()

    def write() -> None:
        with CheckpointReader(directory / fragments) as source:
            write_rank(source, made, Layout.of(source), communicator.rank)

    def publish() -> None:
        if communicator.rank == 0:
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                final.rename(replaced)
            made.rename(final)
            if attempt.latest:
                write_latest(directory, tag)
            shutil.rmtree(replaced, ignore_errors=True)

    try:
        write_checkpoint(Attempt(directory, fragments, attempt.ranks, latest=False), groups, index, communicator)
        for action in (prepare, write, publish):
            on_all_ranks(action, what, communicator)
    finally:
        if communicator.rank == 0:
            shutil.rmtree(made, ignore_errors=True)
            shutil.rmtree(directory / fragments, ignore_errors=True)
